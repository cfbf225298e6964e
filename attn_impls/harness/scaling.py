"""What the rounds of several ranks say: speed-up, efficiency, exposed communication, the bound, and each rank's share."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..parallel.plan import Form, Plan
from ..workload import DTYPE_NAMES
from . import measure
from .case import Case
from .clock import Clock
from .makespan import Probe, Track
from .selection import Selection


def facts(plan: Plan, timing: dict[str, Track], probe: Probe, clock: Clock) -> dict[str, Any]:
    """The flat extra_info that the rounds, the probe and one more call give. All ranks call it together."""
    track, ranks = timing["ranks"], probe.ranks
    alone, silent, traffic = timing.get("one rank"), timing.get("silent"), plan.traffic()
    found = measure.facts(measure.Timing(track.samples, alone.samples if alone else None, track.retries), clock)
    ratio = [found.pop(key) for key in ("vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high")]
    cost = measure.cost(track.call, clock, track.median)
    peaks = ranks.exchange(cost["peak_bytes"])
    found |= {
        **dict(zip(("speedup", "speedup_ci_low", "speedup_ci_high"), ratio, strict=True)),
        "efficiency": ratio[0] and ratio[0] / ranks.size,
        "one_rank_s": alone and alone.median,
        "one_rank_median_s_by_rank": alone and alone.rank_medians,
        "median_s_by_rank": track.rank_medians,
        "slowest_rank": max(range(ranks.size), key=track.rank_medians.__getitem__),
        "imbalance": track.imbalance,
        "silent_s": silent and silent.median,
        "exposed_s": track.median - silent.median if silent else 0.0,
        "padding_bound": plan.bound,
        "host_us": cost["host_us"],
        "peak_bytes_by_rank": peaks,
        "peak_bytes": None if None in peaks else max(peaks),
    }
    if traffic:
        found |= {
            "collective": traffic.collective,
            "message_bytes": traffic.bytes,
            "probe_s": probe.seconds(traffic),
            "probe_bus_gb_per_s": probe.bus_bytes_per_s(traffic) / 1e9,
        }
    bound = bound_seconds(plan, alone.median if alone else None, found.get("probe_s", 0.0), ranks.size)
    return found | {"bound_s": bound, "percent_of_bound": bound and 100 * bound / track.median}


def bound_seconds(plan: Plan, alone: float | None, communication: float, size: int) -> float | None:
    """The least time of a form: one rank's time shared out (padding included), with the bare collective beside or behind it."""
    if alone is None:
        return None
    compute, traffic = alone / size / plan.bound, plan.traffic()
    return max(compute, communication) if traffic and traffic.overlapped else compute + communication


def identity(case: Case, form: Form, selection: Selection, seconds: float) -> dict[str, Any]:
    """The flat extra_info that says what was measured; seconds: its median makespan."""
    w, implementation = case.workload, case.implementation
    return {
        "strategy": form.strategy,
        "form": form.name,
        "implementation": implementation.name,
        "library": implementation.dist or "torch",
        "library_version": implementation.version,
        "approximate": implementation.approximate,
        "layout": implementation.layout,
        "workload": str(w),
        **{name: getattr(w, name) for name in w.__dataclass_fields__},
        "dtype": DTYPE_NAMES[w.dtype],
        "label": selection.labels.get(w, ""),
        "direction": "forward",
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "flops": w.flops(),
        "tflops": w.flops() / seconds / 1e12,
        "seed": selection.seed,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
