"""The verdict on a kernel's output: against the float64 oracle and against SDPA, on inputs that expose and plain ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..registry import REGISTRY, Kernel, Unsupported
from ..workload import Workload
from . import inputs as make
from .case import Case, CaseFailed, DeviceLost, build, call
from .inputs import Inputs
from .oracle import Reference, reference

POISON_BYTES = 2**28


@dataclass(frozen=True)
class Verdict:
    """What the check found. The errors are multiples of what is allowed: 1 or less passes."""

    error_over_budget: float  # worst row against the oracle
    rms_over_budget: float
    sdpa_over_budget: float | None  # worst row against SDPA; None where SDPA cannot do the workload
    sdpa_error_over_budget: float | None  # SDPA's own worst row against the oracle
    bitwise_repeatable: bool
    drift_over_budget: float = 0.0  # all rows together too large or too small
    complaint: str = ""  # what disqualifies the output before any comparison

    @property
    def failure(self) -> str:
        """Why the kernel is wrong by the oracle, or ""."""
        if self.complaint:
            return self.complaint
        if self.error_over_budget > 1:
            return f"differs from the float64 oracle: its worst row errs {self.error_over_budget:.3g} × the budget"
        if self.drift_over_budget > 1:
            return f"differs from the float64 oracle: its rows are all a little off, {self.drift_over_budget:.3g} × the budget"
        return ""

    @property
    def sdpa_is_wrong(self) -> bool:
        """Whether SDPA itself fails the oracle: then nothing should be held against it, or timed against it."""
        return self.sdpa_error_over_budget is not None and self.sdpa_error_over_budget > 1

    @property
    def disqualified(self) -> str:
        """Why the kernel must not be timed, or ""."""
        return self.failure or ("" if self.sdpa_is_wrong else self.sdpa_failure)

    @property
    def sdpa_failure(self) -> str:
        """Why the output is not close to SDPA's, or ""; names SDPA where SDPA is the one that is wrong."""
        if self.complaint:
            return self.complaint
        if self.sdpa_is_wrong:
            return f"cannot be compared: SDPA itself fails the oracle ({self.sdpa_error_over_budget:.3g} × the budget)"
        if self.sdpa_over_budget is not None and self.sdpa_over_budget > 1:
            return f"differs from SDPA: its worst row is {self.sdpa_over_budget:.3g} × both budgets away"
        return ""


class Problem:
    """The tensors of one workload and the right answers to them; each made when first asked for."""

    def __init__(self, workload: Workload, device: str, seed: int):
        self.workload, self.device, self.seed = workload, device, seed

    @cached_property
    def plain(self) -> Inputs:
        return make.plain(self.workload, self.device, self.seed)

    @cached_property
    def needles(self) -> Inputs:
        return make.needles(self.workload, self.device, self.seed + 1)

    @cached_property
    def references(self) -> tuple[Reference, Reference]:
        """For the needles and for the plain inputs."""
        prefer = make.needle_rows(self.workload, self.seed + 1)
        return reference(self.workload, self.needles, self.seed, prefer), reference(self.workload, self.plain, self.seed)

    @cached_property
    def sdpa(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """SDPA's outputs for the needles and the plain inputs; None where it cannot do this workload."""
        case = Case(self.workload, REGISTRY["sdpa"], self.device)
        try:
            kernel, _ = build(case, self.needles)
            return call(case, kernel, self.needles), call(case, kernel, self.plain)
        except DeviceLost:  # SDPA broke it, and not the case that asked
            raise
        except (Unsupported, CaseFailed):  # SDPA's own test says which
            return None

    def judge(self, case: Case, kernel: Kernel) -> Verdict:
        """Run the kernel twice on each of two inputs, in poisoned memory, and compare. Raises CaseFailed if it raises."""
        errors, rms, drifts, apart, sdpa_errors = [], [], [], [], []
        repeatable = True
        for n, original in enumerate((self.needles, self.plain)):
            known, copy = self.references[n], original.as_layout(case.implementation.layout)
            outs = []
            for _ in range(2):
                poison(self.workload, self.device)
                out = call(case, kernel, copy)
                outs.append(out.transpose(1, 2) if case.implementation.layout == "bshd" else out)
                outs[-1] = outs[-1].clone()  # a kernel may hand out the same buffer again
            repeatable &= torch.equal(*outs)
            complaint = _complaint(outs[0], original, copy, case.implementation.layout)
            if complaint:
                return Verdict(float("inf"), float("inf"), None, None, repeatable, complaint=complaint)
            errors += [known.over_budget(out) for out in outs]
            drifts += [known.drift_over_budget(out) for out in outs]
            rms.append(known.rms_over_budget(outs[0]))
            if self.sdpa:
                apart += [known.apart(out, self.sdpa[n]) for out in outs]
                sdpa_errors.append(known.over_budget(self.sdpa[n]))
        sdpa = max(apart, default=None), max(sdpa_errors, default=None)
        return Verdict(max(errors), max(rms), *sdpa, repeatable, max(drifts))


def poison(w: Workload, device: str) -> None:
    """Leave NaN in the memory that the allocator will hand out next: what writes nothing must not look right."""
    shape = w.shapes()["out"]
    blocks = min(64, max(2, POISON_BYTES // (math.prod(shape) * w.dtype.itemsize)))  # free lists hold many small ones
    for _ in [torch.full(shape, float("nan"), dtype=w.dtype, device=device) for _ in range(blocks)]:
        pass


def _complaint(out: torch.Tensor, original: Inputs, copy: Inputs, layout: str) -> str:
    if bool(out.isnan().any()):
        return f"returned NaN in {int(out.isnan().any(-1).sum())} of {out.shape[:-1].numel()} rows"
    for name, before, after in zip("qkv", original, copy, strict=True):
        if not torch.equal(before, after.transpose(1, 2) if layout == "bshd" else after):
            return f"changed its input {name}"
    return ""
