"""One workload on all ranks: planned, checked against the unsharded answer, then timed by the slowest rank."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from ..parallel.plan import Form, Plan, Spread
from ..registry import Kernel, Unsupported
from ..workload import Workload
from . import gradients, makespan, scaling, topology
from .case import Case, CaseFailed, OutOfMemory, build, call, guard, release, validate
from .inputs import Inputs
from .judge import Problem
from .oracle import Reference
from .ranks import Ranks


@dataclass(frozen=True)
class SpreadVerdict:
    """What the check found on all ranks; errors are multiples of what is allowed, 1 or less passes."""

    error_over_budget: float  # the worst rank's worst row against the unsharded oracle
    worst_rank: int
    unsharded_error_over_budget: float | None  # of the same kernel on one rank; None where it does not fit
    complaint: str = ""

    @property
    def failure(self) -> str:
        if self.complaint:
            return self.complaint
        if self.error_over_budget > 1:
            alone = self.unsharded_error_over_budget
            beside = "" if alone is None else f" (unsharded {alone:.3g} ×)"
            return (
                f"on rank {self.worst_rank} differs from the unsharded float64 oracle: "
                f"its worst row errs {self.error_over_budget:.3g} × the budget{beside}"
            )
        return ""


class Spreads:
    """What the ranks of one session check and time together. Every method is called on all ranks alike."""

    def __init__(self, session: Any):
        self.session = session
        self.results: list[dict[str, Any]] = []  # pytest-benchmark's dict of each finished case
        self.not_run: dict[tuple[str, str, str], str] = {}  # (workload id, form, implementation): why
        self._answers: tuple[Problem | None, dict[tuple[str, bool | str], tuple[Reference, Reference]]] = (None, {})
        self._same_inputs: set[Workload] = set()
        self._alone_missing = ""  # why one rank cannot do the whole problem of the case at hand
        self._probe: makespan.Probe | None = None

    @property
    def ranks(self) -> Ranks:
        assert self.session.ranks is not None, "distributed tests are left out without torchrun"
        return self.session.ranks

    @property
    def probe(self) -> makespan.Probe:
        if self._probe is None:
            self._probe = makespan.Probe(self.ranks, self.session.clock, self.session.device)
        return self._probe

    def plan(self, case: Case, form: Form, problem: Problem) -> tuple[Plan, float]:
        """The plan of this rank, with its kernels compiled and called, and the seconds that took."""
        selection = self.session.selection
        started = time.perf_counter()
        spread = Spread(
            case.workload,
            case.implementation,
            case.device,
            self.ranks.rank,
            self.ranks.size,
            partial(_kernel, case),
            selection.pad_heads,
            selection.overlap_chunks,
            selection.seed,
        )

        def alone() -> Plan:
            plan = form.plan(spread)
            with guard(case, "kernel"):
                share = plan.share(problem.plain)
                plan.rehearse(share)
                _synchronize(case.device)
                _validate(case, plan, share)
            return plan

        self._agree_on_inputs(problem)
        plan = self.ranks.guarded("planning", alone)
        self.ranks.guarded("connecting", plan.connect, collective=True)
        return plan, time.perf_counter() - started

    def verdict(self, case: Case, form: Form, plan: Plan, problem: Problem, whole: Kernel | None) -> SpreadVerdict:
        """Run the plan twice on each of two inputs and compare every rank's result with the unsharded answer."""
        answers = self.ranks.guarded("the answer", lambda: self._answer(case, form, plan, problem))
        errors: list[float] = []
        for inputs, known in zip((problem.needles, problem.plain), answers, strict=True):
            share = self.ranks.guarded("sharing", partial(plan.share, inputs))
            for _ in range(2):
                self.ranks.guarded("poisoning", partial(_poison, case))
                # a copy: a result may be memory that the next call writes to
                out = self.ranks.guarded("checking", partial(_run, plan, share, case.device), collective=True).clone()
                errors.append(self.ranks.guarded("comparing", partial(_error, plan, known, out)))
        alone = self._unsharded_error(case, problem, whole) if whole else None
        worst = [one[0] for one in self.ranks.exchange((max(errors),))]
        rank = max(range(len(worst)), key=worst.__getitem__)
        return SpreadVerdict(worst[rank], rank, alone)

    def measure(self, case: Case, form: Form, problem: Problem, benchmark: Any) -> None:
        """Check, then time one form of one case. Skips or fails the test, on all ranks, if it cannot be timed."""
        with outcome(case):
            self._measure(case, form, problem, benchmark)

    def gradient_errors(self, case: Case, form: Form, problem: Problem) -> dict[str, float]:
        """dq, dk and dv of every rank against the unsharded answer: the worst rank's worst row, over its budget.

        Skips the test where there is no answer or no backward. Only plans with `gradients` can be asked.
        """
        with outcome(case):
            if not case.implementation.backward:
                raise Unsupported("no backward")
            w, inputs = case.workload, problem.plain
            plan: Any = self.plan(case, form, problem)[0]
            dout = self.ranks.guarded("dout", lambda: gradients.upstream(w, case.device, problem.seed))
            known = self.ranks.guarded("the gradients' answer", lambda: gradients.reference(w, inputs, dout))
            share = self.ranks.guarded("sharing", partial(plan.share, inputs))
            found = self.ranks.guarded("gradients", lambda: plan.gradients(share, dout), collective=True)
            mine = self.ranks.guarded("comparing", lambda: gradients.errors(plan, known, found))
            everyone = self.ranks.exchange(mine)
            return {name: max(one[name] for one in everyone) for name in mine}

    def _measure(self, case: Case, form: Form, problem: Problem, benchmark: Any) -> None:
        plan, build_seconds = self.plan(case, form, problem)
        whole = self._whole_kernel(case, problem)
        verdict = self.verdict(case, form, plan, problem, whole)
        if verdict.failure or (verdict.unsharded_error_over_budget or 0) > 1:
            whole = None
        if verdict.failure:
            raise CaseFailed(f"{case.implementation.name} {verdict.failure}; it is not timed")
        share = self.ranks.guarded("sharing", partial(plan.share, problem.plain))
        calls: dict[str, Callable[[], Any]] = {"ranks": partial(plan, share)}
        if whole:
            native = self.ranks.guarded("sharing", lambda: problem.plain.as_layout(case.implementation.layout))
            calls["one rank"] = partial(whole, *native)
        if plan.traffic():
            calls["silent"] = partial(plan.silent, share)
        selection = self.session.selection
        rounds = makespan.Rounds(self.ranks, self.session.clock, calls)
        timing = self.ranks.guarded(
            "timing", lambda: rounds.run(benchmark, selection.rounds, selection.warmup_rounds), collective=True
        )
        if not benchmark.enabled:
            return
        try:
            probing = partial(scaling.facts, plan, timing, self.probe, self.session.clock)
            facts = self.ranks.guarded("probing", probing, collective=True)
            self.ranks.guarded("physics", lambda: self.session.reject_impossible(case, timing["ranks"].median, self.ranks.size))
            facts |= scaling.identity(case, form, selection, timing["ranks"].median)
            facts |= {
                "error_over_budget": verdict.error_over_budget,
                "unsharded_error_over_budget": verdict.unsharded_error_over_budget,
                "one_rank_missing": self._alone_missing,
                "world_size": self.ranks.size,
                "nodes": self.ranks.nodes,
                "build_s": build_seconds,
            }
            self._record(benchmark, facts)
        except BaseException:
            benchmark.has_error = True
            raise

    def _record(self, benchmark: Any, facts: dict[str, Any]) -> None:
        benchmark.extra_info.update(facts)
        if self.ranks.rank:
            return
        # pytest-benchmark would store the parameters' repr, with addresses and paths
        benchmark.stats.params = {name: facts[name] for name in ("workload", "form", "implementation")}
        session = self.session
        session.machine_info.update(topology.facts(self.ranks))
        self.results.append(benchmark.stats.as_dict())
        session.keep(self.results[-1])

    def _agree_on_inputs(self, problem: Problem) -> None:
        """Fail unless every rank has generated the same q, k and v."""
        if problem.workload in self._same_inputs:
            return
        sums = self.ranks.guarded("inputs", lambda: _sums(*problem.plain, *problem.needles))
        if any(one != sums for one in self.ranks.exchange(sums)):
            raise CaseFailed("the ranks generated different inputs from one seed: give them devices of one kind")
        self._same_inputs.add(problem.workload)

    def _answer(self, case: Case, form: Form, plan: Plan, problem: Problem) -> tuple[Reference, Reference]:
        """What this rank must return for the needles and the plain inputs; the same for a form's implementations of a class."""
        if self._answers[0] is not problem:
            self._answers = (problem, {})
        known, key = self._answers[1], (form.name, case.implementation.approximate)
        if key not in known:
            inputs, whole = (problem.needles, problem.plain), problem.known(case.implementation.approximate)
            one, two = (plan.answer(reference, given) for reference, given in zip(whole, inputs, strict=True))
            known[key] = one, two
        return known[key]

    def _whole_kernel(self, case: Case, problem: Problem) -> Kernel | None:
        """The same implementation's kernel for the whole problem; None where one rank cannot do it alone."""

        def alone() -> Kernel | None:
            self._alone_missing = ""
            try:
                return build(case, problem.plain.as_layout(case.implementation.layout))[0]
            except (OutOfMemory, Unsupported) as error:  # the parts may still run
                self._alone_missing = str(error).splitlines()[0]
                return None

        kernel = self.ranks.guarded("one rank alone", alone)
        self._alone_missing = next(filter(None, self.ranks.exchange(self._alone_missing)), "")
        return None if self._alone_missing else kernel

    def _unsharded_error(self, case: Case, problem: Problem, whole: Kernel) -> float:
        layout = case.implementation.layout

        def alone() -> float:
            errors = []
            judged = problem.known(case.implementation.approximate)
            for inputs, known in zip((problem.needles, problem.plain), judged, strict=True):
                out = call(case, whole, inputs.as_layout(layout))
                errors.append(known.over_budget(out if layout == "bhsd" else out.transpose(1, 2)))
            return max(errors)

        return max(self.ranks.exchange(self.ranks.guarded("one rank alone", alone)))


@contextlib.contextmanager
def outcome(case: Case) -> Iterator[None]:
    """Turn what a phase that all ranks ended alike raises into pytest's outcome, and free the case's memory."""
    try:
        yield
        return
    except (Unsupported, CaseFailed) as error:
        failed = error
        traceback.clear_frames(error.__traceback__)  # a report keeps them, and they keep tensors
    release(case.device, failed if isinstance(failed, CaseFailed) else None)
    if isinstance(failed, Unsupported):
        raise pytest.skip.Exception(f"{case.implementation.name}: {failed}") from None
    raise pytest.fail.Exception(str(failed), pytrace=False) from None


def _kernel(case: Case, local: Workload) -> Kernel:
    with guard(case, "builder"), torch.device(case.device):
        return case.implementation(local)


def _validate(case: Case, plan: Any, share: list[Inputs]) -> None:
    """Hold each chunk's kernel to what a kernel alone is held to: its output's shape, dtype and device, its inputs unchanged."""
    for chunk, (kernel, inputs) in enumerate(zip(plan.kernels, share, strict=True)):
        before = [tensor.clone() for tensor in inputs]
        validate(Case(plan.partition.local(chunk), case.implementation, case.device), kernel(*inputs))
        for name, old, new in zip("qkv", before, inputs, strict=True):
            if not torch.equal(old, new):
                raise CaseFailed(f"{case.implementation.name} changed its input {name}")


def _run(plan: Plan, share: list[Inputs], device: str) -> torch.Tensor:
    out = plan(share)
    _synchronize(device)
    return out


def _error(plan: Plan, known: Reference, out: torch.Tensor) -> float:
    found = plan.comparable(out)
    if not known.out.numel():  # a rank of nothing but padding
        return 0.0
    expected = (known.out.shape[0], known.out.shape[1], known.out.shape[3])
    if (found.shape[0], found.shape[1], found.shape[3]) != expected:
        raise CaseFailed(f"the result has shape {tuple(found.shape)}, expected batch, heads and head dim {expected}")
    return known.over_budget(found)


def _poison(case: Case) -> None:
    """Leave NaN in the memory that the allocator hands out next: a collective that never wrote must not look right."""
    shape = case.workload.shapes()["out"]
    for _ in [torch.full(shape, float("nan"), dtype=case.workload.dtype, device=case.device) for _ in range(2)]:
        pass


def _sums(*tensors: torch.Tensor) -> list[float]:
    return [float(tensor.double().sum()) for tensor in tensors]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
