"""The backward pass on all ranks: every rank's gradients against the unsharded ones, and what is timed."""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Unsupported
from . import answers, gradients, sharded
from .case import CaseFailed, OutOfMemory, guard
from .judge import poison
from .oracle import Reference
from .passes import BackwardPass, of_kernel
from .sharded import Calls, SpreadVerdict, Trial


def errors(trial: Trial) -> dict[str, list[float]]:
    """The worst row of each gradient ("q", "k", "v", "weight"), by rank, as a share of its budget.

    Raises Unsupported where there is no backward pass, or no answer to hold it against.
    """
    case, plan, problem = trial.case, trial.plan, trial.problem
    if not case.implementation.backward:
        raise Unsupported("forward only")
    share = trial.guarded("sharing", partial(plan.share, *problem.plain))
    graph = trial.guarded("the forward pass", partial(plan.forward, share))
    known = _known(trial, plan.holding.weight)
    upstream = trial.guarded("sharing", lambda: plan.upstream(_dout(trial)))
    trial.guarded("poisoning", partial(poison, case.workload, case.device))
    found = trial.guarded("gradients", partial(plan.backward, graph, upstream), collective=True)
    mine = trial.guarded("comparing", partial(answers.gradient_errors, plan, known, found))
    everyone = trial.ranks.exchange(mine)
    return {name: [one[name] for one in everyone] for name in mine}


def prepare(trial: Trial) -> tuple[Calls, SpreadVerdict]:
    """Check, then say what to time: the gradient kernels and what they send, without the forward pass."""
    plan, found = trial.plan, errors(trial)
    alone, error = _alone(trial)
    worst = max(found, key=lambda name: max(found[name]))
    by_rank = found[worst]
    verdict = SpreadVerdict(max(by_rank), by_rank.index(max(by_rank)), error, f"the worst row of d{worst}")
    if verdict.failure:
        raise CaseFailed(f"{trial.case.implementation.name} {verdict.failure}; it is not timed")
    share = trial.guarded("sharing", partial(plan.share, *trial.problem.plain))
    upstream = trial.guarded("sharing", lambda: plan.upstream(_dout(trial)))
    forward = partial(plan.forward, share)
    calls: Calls = {"ranks": BackwardPass(forward, partial(plan.backward, upstream=upstream))}
    if alone and (error or 0) <= 1:
        calls["one rank"] = alone
    if plan.traffic("backward"):
        calls["silent"] = BackwardPass(forward, partial(plan.backward, upstream=upstream, silent=True))
    return calls, verdict


def _dout(trial: Trial) -> torch.Tensor:
    return gradients.upstream(trial.case.workload, trial.case.device, trial.problem.seed)


def _known(trial: Trial, weight: torch.Tensor | None) -> dict[str, Reference]:
    make = partial(answers.unsharded_gradients, trial.case.workload, trial.problem.plain, weight=weight)
    return trial.known(("gradients", weight is not None), lambda: make(dout=_dout(trial)))


def _alone(trial: Trial) -> tuple[BackwardPass | None, float | None]:
    """The whole problem's backward pass on one rank, and its worst row's error; None where one rank cannot."""
    case, whole, known = trial.case, trial.whole, _known(trial, None)
    if whole is None:
        return None, None

    def alone() -> tuple[BackwardPass | None, float]:
        native = trial.problem.plain.as_layout(case.implementation.layout)
        backward = of_kernel(whole, (native.q, native.k, native.v), sharded.in_layout(_dout(trial), case.implementation.layout))
        try:
            with guard(case, "kernel"):
                backward.renew(1)
                found = backward()
                sharded.synchronize(case.device)
        except OutOfMemory:  # the parts may still run
            return None, 0.0
        bhsd = case.implementation.layout == "bhsd"
        rows = zip("qkv", found, strict=True)
        return backward, max(known[name].over_budget(one if bhsd else one.transpose(1, 2)) for name, one in rows)

    backward, error = trial.guarded("one rank alone", alone)
    fits = all(trial.ranks.exchange(backward is not None))
    return (backward, trial.worst(error)[0]) if fits else (None, None)
