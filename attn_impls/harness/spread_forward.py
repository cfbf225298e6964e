"""The forward pass on all ranks: every rank's result against the unsharded answer, and what is timed."""

from __future__ import annotations

from functools import partial

from ..registry import as_bhsd
from . import answers, sharded
from .case import CaseFailed, call
from .judge import poison
from .sharded import Calls, SpreadVerdict, Trial


def check(trial: Trial) -> SpreadVerdict:
    """Run the plan twice on each of two inputs and compare every rank's result with the unsharded answer."""
    case, plan, problem = trial.case, trial.plan, trial.problem
    both = problem.judged(case.implementation.approximate)

    def known() -> list[answers.Reference]:
        held = partial(answers.held, case.workload, holding=plan.holding, size=plan.spread.size)
        return [
            held(reference, inputs)
            for reference, inputs in zip(problem.known(case.implementation.approximate), both, strict=True)
        ]

    errors: list[float] = []
    for inputs, answer in zip(
        both, trial.known(("output", trial.form.name, case.implementation.approximate), known), strict=True
    ):
        share = trial.guarded("sharing", partial(plan.share, *inputs))
        for _ in range(2):
            trial.guarded("poisoning", partial(poison, case.workload, case.device))
            checked = trial.settled if plan.rehearses or errors else trial.guarded  # else this is its first call
            out = checked("checking", partial(sharded.run, plan, share, case.device), collective=True)
            errors.append(trial.guarded("comparing", partial(sharded.output_error, plan, answer, out)))
    alone = trial.worst(trial.guarded("one rank alone", partial(_unsharded_error, trial)))[0] if trial.whole else None
    return SpreadVerdict(*trial.worst(max(errors)), alone)


def prepare(trial: Trial) -> tuple[Calls, SpreadVerdict]:
    """Check, then say what to time. Raises CaseFailed on a wrong result."""
    verdict = check(trial)
    if verdict.failure:
        raise CaseFailed(f"{trial.case.implementation.name} {verdict.failure}; it is not timed")
    plan, plain = trial.plan, trial.problem.plain
    share = trial.guarded("sharing", partial(plan.share, *plain))
    calls: Calls = {"ranks": partial(plan, share)}
    if trial.whole and (verdict.unsharded_error_over_budget or 0) <= 1:
        native = trial.guarded("sharing", lambda: plain.as_layout(trial.case.implementation.layout))
        calls["one rank"] = partial(trial.whole, *native)
    if plan.traffic():
        calls["silent"] = partial(plan.silent, share)
    return calls, verdict


def _unsharded_error(trial: Trial) -> float:
    """The worst row of the whole problem's kernel on one rank."""
    case, problem, errors = trial.case, trial.problem, []
    assert trial.whole
    approximate = case.implementation.approximate
    for inputs, known in zip(problem.judged(approximate), problem.known(approximate), strict=True):
        out = call(case, trial.whole, inputs.as_layout(case.implementation.layout))
        errors.append(known.over_budget(as_bhsd(out, case.implementation.layout)))
    return max(errors)
