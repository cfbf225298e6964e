"""One form of one case on all ranks, planned: what is known about it, and what each rank checks of it for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..parallel.plan import Form, Plan, Share
from ..registry import Kernel, Unsupported
from ..workload import Workload
from .case import Case, CaseFailed, guard, too_late, validate
from .judge import Problem
from .oracle import Reference
from .ranks import Ranks

T = TypeVar("T")
Calls = dict[str, Callable[[], Any]]  # "ranks", and where there is one "one rank" and "silent": what is timed together


@dataclass(frozen=True)
class SpreadVerdict:
    """What the check found on all ranks; errors are multiples of what is allowed, 1 or less passes."""

    error_over_budget: float  # the worst rank's worst row against the unsharded oracle
    worst_rank: int
    unsharded_error_over_budget: float | None  # of the same kernel on one rank; None where it does not fit
    what: str = "its worst row"
    alone_missing: str = ""  # why one rank has no time of its own, where it turned out after planning

    @property
    def failure(self) -> str:
        if self.error_over_budget <= 1:
            return ""
        alone = self.unsharded_error_over_budget
        beside = "" if alone is None else f" (unsharded {alone:.3g} ×)"
        return (
            f"on rank {self.worst_rank} differs from the unsharded float64 oracle: "
            f"{self.what} errs {self.error_over_budget:.3g} × the budget{beside}"
        )


@dataclass(frozen=True)
class Trial:
    """One form of one case, planned on every rank. `whole` is the kernel of the whole problem, None where one rank cannot."""

    ranks: Ranks
    case: Case
    form: Form
    problem: Problem
    plan: Plan
    whole: Kernel | None
    answers: dict[Any, Any]  # of this problem, by what they answer

    def guarded(self, what: str, action: Callable[[], T], collective: bool = False) -> T:
        return self.ranks.guarded(what, action, collective)

    def settled(self, what: str, action: Callable[[], T], collective: bool = False) -> T:
        """`guarded`, for an action in which no kernel has its first call: none may say Unsupported any more."""

        def act() -> T:
            try:
                return action()
            except Unsupported as error:
                raise too_late(self.case, error) from None

        return self.guarded(what, act, collective)

    def known(self, key: Any, make: Callable[[], T]) -> T:
        """An answer, made once for all implementations."""

        def find() -> T:
            if key not in self.answers:
                self.answers[key] = make()
            return self.answers[key]

        return self.guarded("the answer", find)

    def worst(self, error: float) -> tuple[float, int]:
        """The largest of the ranks' errors, and whose it is."""
        errors = self.ranks.exchange(error)
        return max(errors), errors.index(max(errors))


def validate_kernels(case: Case, plan: Plan, share: list[Share]) -> None:
    """Hold each chunk's kernel to what a kernel alone is held to: its output's shape, dtype and device, its inputs unchanged."""
    for w, kernel, tensors in zip(plan.locals, plan.kernels, share, strict=True):
        before = [tensor.clone() for tensor in tensors]
        validate(Case(w, case.implementation, case.device), kernel(*tensors))
        for name, old, new in zip("qkv", before, tensors, strict=True):
            if not torch.equal(old, new):
                raise CaseFailed(f"{case.implementation.name} changed its input {name}")


def run(plan: Any, share: list[Share], device: str) -> torch.Tensor:
    """A copy of the result, which may be memory that the next call writes to."""
    out = plan(share).clone()
    synchronize(device)
    return out


def output_error(plan: Plan, known: Reference, out: torch.Tensor) -> float:
    found = plan.comparable(out)
    if not known.out.numel():  # a rank of nothing but padding, or without a sampled row
        return 0.0
    expected = (known.out.shape[0], known.out.shape[1], known.out.shape[3])
    if (found.shape[0], found.shape[1], found.shape[3]) != expected:
        raise CaseFailed(f"the result has shape {tuple(found.shape)}, expected batch, heads and head dim {expected}")
    return known.over_budget(found)


def sums(problem: Problem) -> list[float]:
    """What shows whether two ranks have generated the same inputs."""
    return [float(tensor.double().sum()) for tensor in (*problem.plain, *problem.needles)]


def local_kernel(case: Case, w: Workload) -> Kernel:
    """The implementation's kernel for what a rank computes."""
    with guard(case, "builder"), torch.device(case.device):
        return case.implementation(w)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
