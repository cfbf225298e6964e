"""How a workload is spread over ranks: one file a strategy, orthogonal to the implementation that each rank runs."""

from . import copied, dtensor, projected, tensor
from .plan import Form, Plan, Spread

# strategy: its forms, each timed and checked apart
STRATEGIES: dict[str, tuple[Form, ...]] = {"tensor": (*tensor.FORMS, *copied.FORMS, *projected.FORMS, *dtensor.FORMS)}

__all__ = ["STRATEGIES", "Form", "Plan", "Spread"]
