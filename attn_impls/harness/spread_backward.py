"""The backward pass on all ranks: every rank's gradients against the unsharded ones, and what is timed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..parallel.plan import Graph
from ..registry import Unsupported
from . import answers, backward, sharded
from .case import CaseFailed, OutOfMemory, guard
from .inputs import as_layout
from .judge import poison
from .oracle import Reference
from .sharded import Calls, SpreadVerdict, Trial


class BackwardPass:
    """A plan's gradients. Each call uses up a forward pass that `ready` has made."""

    def __init__(self, trial: Trial, share: Any, upstream: torch.Tensor, silent: bool = False):
        self.forward = partial(_forward, trial, share)
        self.backward = partial(trial.plan.backward, upstream=upstream, silent=silent)
        self.graphs: list[Graph] = []

    def ready(self, calls: int) -> None:
        """Run as many forward passes; those left over from a round that is measured again go first."""
        self.graphs.clear()
        self.graphs.extend(self.forward() for _ in range(calls))

    def __call__(self) -> Any:
        return self.backward(self.graphs.pop())


def errors(trial: Trial) -> dict[str, list[float]]:
    """The worst row of each gradient ("q", "k", "v", "weight"), by rank, as a share of its budget.

    Raises Unsupported where there is no backward pass, or no answer to hold it against.
    """
    case, plan, problem = trial.case, trial.plan, trial.problem
    if not case.implementation.backward:
        raise Unsupported("forward only")
    found: dict[str, list[float]] = {}
    for n, inputs in enumerate(problem.trained):
        share = trial.guarded("sharing", partial(plan.share, *inputs))
        upstream = trial.guarded("sharing", lambda n=n: plan.upstream(problem.douts[n].clone()))  # type: ignore[misc]
        if n == 0:  # once: a kernel that returns the last call's gradients must not be given the right ones first
            trial.guarded("the backward pass alone", partial(_rehearse, trial, share, upstream))
        known = _known(trial, n)
        graph = trial.settled("the forward pass", partial(_forward, trial, share))
        trial.guarded("poisoning", partial(poison, case.workload, case.device))
        mine = trial.settled("gradients", partial(plan.backward, graph, upstream), collective=True)
        compare = partial(answers.gradient_errors, plan, known, problem.gradient_heads, mine)
        everyone = trial.ranks.exchange(trial.guarded("comparing", compare))
        for name in everyone[0]:
            worst = [
                max(*pair) for pair in zip(found.get(name, [0.0] * len(everyone)), [one[name] for one in everyone], strict=True)
            ]
            found[name] = worst
    return found


def prepare(trial: Trial) -> tuple[Calls, SpreadVerdict]:
    """Check, then say what to time: the gradient kernels and what they send, without the forward pass."""
    plan, problem, found = trial.plan, trial.problem, errors(trial)
    alone, error, missing = _alone(trial)
    worst = max(found, key=lambda name: max(found[name]))
    by_rank = found[worst]
    verdict = SpreadVerdict(max(by_rank), by_rank.index(max(by_rank)), error, f"the worst row of d{worst}", missing)
    if verdict.failure:
        raise CaseFailed(f"{trial.case.implementation.name} {verdict.failure}; it is not timed")
    share = trial.guarded("sharing", partial(plan.share, *problem.plain))
    upstream = trial.guarded("sharing", lambda: plan.upstream(problem.douts[1].clone()))
    calls: Calls = {"ranks": BackwardPass(trial, share, upstream)}
    if alone and (error or 0) <= 1:
        calls["one rank"] = alone
    if plan.traffic("backward"):
        calls["silent"] = BackwardPass(trial, share, upstream, silent=True)
    return calls, verdict


def _forward(trial: Trial, share: Any) -> Graph:
    graph = trial.plan.forward(share)
    if not graph.out.requires_grad:
        raise Unsupported("forward only: its output carries no gradient")
    return graph


def _rehearse(trial: Trial, share: Any, upstream: torch.Tensor) -> None:
    """Compile, and learn whether there is a backward pass, before anybody waits for this rank."""
    with guard(trial.case, "backward pass", allowed=True):
        try:
            trial.plan.backward(_forward(trial, share), upstream, silent=True)
        except Unsupported:
            raise
        except Exception as error:
            if reason := backward.forward_only(error):
                raise Unsupported(reason) from None
            raise
        sharded.synchronize(trial.case.device)


def _known(trial: Trial, n: int) -> dict[str, Reference]:
    """The answers for the needles (0) or the plain inputs (1), on all ranks."""
    problem, weight = trial.problem, trial.plan.holding.weight
    if weight is None:
        return trial.known(("gradients", n), lambda: problem.gradient_references[n])
    inputs = problem.trained[n]
    make = partial(answers.unsharded_gradients, trial.case.workload, inputs, weight=weight, kv_heads=problem.gradient_heads["k"])
    return trial.known(("projected gradients", n), lambda: make(dout=problem.douts[n]))


def _alone(trial: Trial) -> tuple[Any, float | None, str]:
    """The whole problem's backward pass on one rank and its worst row's error; None and why, where a rank cannot."""
    case, whole, problem = trial.case, trial.whole, trial.problem
    if whole is None:
        return None, None, ""

    def alone() -> tuple[Any, float, str]:
        layout, known = case.implementation.layout, problem.gradient_references[1]
        native = problem.plain.as_layout(layout)
        dout = as_layout(problem.douts[1], layout)
        try:
            found = backward.gradients(case, whole, native, dout, first=True)
        except (OutOfMemory, Unsupported) as error:  # the parts may still run
            return None, 0.0, str(error).partition("\n")[0]
        over = (known[name].over_budget(one[:, problem.gradient_heads[name]]) for name, one in zip("qkv", found, strict=True))
        return problem.call(case, whole), max(over), ""

    call, error, missing = trial.guarded("one rank alone", alone)
    missing = next(filter(None, trial.ranks.exchange(missing)), "")
    return (None, None, missing) if missing else (call, trial.worst(error)[0], "")
