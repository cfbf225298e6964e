"""The flat extra_info that says what a time is of: the same for one GPU and for many."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..workload import DTYPE_NAMES
from .case import Case
from .selection import Selection


def identity(case: Case, selection: Selection, seconds: float) -> dict[str, Any]:
    """seconds: the median time of the case."""
    w, implementation, direction = case.workload, case.implementation, case.direction
    return {
        "implementation": implementation.name,
        "library": implementation.dist or "torch",
        "library_version": implementation.version,
        "approximate": implementation.approximate,
        "layout": implementation.layout,
        "workload": str(w),
        **{name: getattr(w, name) for name in w.__dataclass_fields__},
        "dtype": DTYPE_NAMES[w.dtype],
        "label": selection.labels.get(w, ""),
        "direction": direction,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "flops": w.flops(direction),
        "bytes": w.bytes(direction),
        "tflops": w.flops(direction) / seconds / 1e12,
        "tb_per_s": w.bytes(direction) / seconds / 1e12,
        "seed": selection.seed,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
