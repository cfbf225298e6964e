"""Attention implementations, and the machinery that judges them: which is right, which is fastest, how far from the limit."""

from .registry import Unsupported, attention
from .workload import Workload

__all__ = ["Unsupported", "Workload", "attention"]
