"""Attention implementations, and the machinery that judges them: which is right, which is fastest, how far from the limit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registry import Unsupported, attention
    from .workload import Workload

__all__ = ["Unsupported", "Workload", "attention"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: every pytest in this environment loads the package's plugin, few need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".workload" if name == "Workload" else ".registry", __name__), name)
