"""What speaks against a tensor before, or instead of, a verdict: NaN, changed inputs, a worst row."""

from __future__ import annotations

import math

import torch

from ..registry import as_bhsd
from .inputs import Inputs
from .oracle import Reference


def worst_row(out: torch.Tensor, judged: torch.Tensor, known: Reference, of: str) -> tuple[float, str]:
    """The error of an output by those of its heads that are known, over its budget, and in words; infinity for any NaN."""
    if nan := nan_rows(out, of):
        return math.inf, nan
    error, drift = known.over_budget(judged), known.drift_over_budget(judged)
    if drift > max(error, 1):
        return drift, f"its rows{of and f' of {of}'} are all a little off, {drift:.3g} × the budget"
    return error, f"its worst row{of and f' of {of}'} errs {error:.3g} × the budget"


def nan_rows(out: torch.Tensor, of: str = "") -> str:
    """How many rows [.., D] hold NaN, in words; "" if none."""
    rows = out.isnan().any(-1)
    return f"returned NaN in {int(rows.sum())} of {rows.numel()} rows{of and f' of {of}'}" if bool(rows.any()) else ""


def complaint_of(out: torch.Tensor | None, original: Inputs, copy: Inputs, layout: str) -> str:
    """NaN in an output, or inputs (in the layout) that are no longer the original ones (bhsd); "" if neither."""
    if out is not None and (complaint := nan_rows(out)):
        return complaint
    for name, before, after in zip("qkv", original, copy, strict=True):
        if not torch.equal(before, as_bhsd(after, layout)):
            return f"changed its input {name}"
    return ""
