"""What the judge found of an output or of gradients, and the worst of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any


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
    of: str = ""  # the worst gradient's name; "" for an output
    by_gradient: dict[str, float] = field(default_factory=dict)  # each one's worst row against the oracle

    @property
    def failure(self) -> str:
        """Why the kernel is wrong by the oracle, or ""."""
        if self.complaint:
            return self.complaint
        if self.error_over_budget > 1:
            return f"{self._differs} from the float64 oracle: its worst row errs {self.error_over_budget:.3g} × the budget"
        if self.drift_over_budget > 1:
            drift = f"{self.drift_over_budget:.3g} × the budget"
            return f"{self._differs} from the float64 oracle: its rows are all a little off, {drift}"
        return ""

    @property
    def _differs(self) -> str:
        return f"differs in {self.of}" if self.of else "differs"

    @property
    def sdpa_is_wrong(self) -> bool:
        """Whether SDPA itself fails the oracle: then nothing should be held against it, or timed against it."""
        return self.sdpa_error_over_budget is not None and self.sdpa_error_over_budget > 1

    @property
    def disqualified(self) -> str:
        """Why the kernel must not be timed, or ""."""
        return self.failure or ("" if self.sdpa_is_wrong else self.sdpa_failure)

    @property
    def facts(self) -> dict[str, Any]:
        """The flat extra_info of a case that passed."""
        return {
            "error_over_budget": self.error_over_budget,
            **{f"{name}_error_over_budget": error for name, error in self.by_gradient.items()},
            "rms_over_budget": self.rms_over_budget,
            "sdpa_over_budget": self.sdpa_over_budget,
            "bitwise_repeatable": self.bitwise_repeatable,
        }

    @property
    def sdpa_failure(self) -> str:
        """Why the output is not close to SDPA's, or ""; names SDPA where SDPA is the one that is wrong."""
        if self.complaint:
            return self.complaint
        if self.sdpa_is_wrong:
            return f"cannot be compared: SDPA itself fails the oracle ({self.sdpa_error_over_budget:.3g} × the budget)"
        if self.sdpa_over_budget is not None and self.sdpa_over_budget > 1:
            return f"{self._differs} from SDPA: its worst row is {self.sdpa_over_budget:.3g} × both budgets away"
        return ""


def worst_of(found: dict[str, list[Verdict]]) -> Verdict:
    """One verdict on all gradients: the most of each figure, named after the gradient that decides."""
    every = [verdict for verdicts in found.values() for verdict in verdicts]
    figures: tuple[Callable[[Verdict], float], ...] = (
        lambda verdict: verdict.error_over_budget,
        lambda verdict: verdict.drift_over_budget,
        lambda verdict: verdict.sdpa_over_budget or 0.0,
    )
    decides = next((figure for figure in figures if max(map(figure, every)) > 1), figures[0])
    return replace(
        max(every, key=decides),
        error_over_budget=max(verdict.error_over_budget for verdict in every),
        rms_over_budget=max(verdict.rms_over_budget for verdict in every),
        drift_over_budget=max(verdict.drift_over_budget for verdict in every),
        sdpa_over_budget=_most(verdict.sdpa_over_budget for verdict in every),
        sdpa_error_over_budget=_most(verdict.sdpa_error_over_budget for verdict in every),
        bitwise_repeatable=all(verdict.bitwise_repeatable for verdict in every),
        by_gradient={f"d{name}": max(verdict.error_over_budget for verdict in verdicts) for name, verdicts in found.items()},
    )


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
