"""One workload on all ranks: planned, checked against the unsharded answer, then timed by the slowest rank."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from ..parallel.plan import Form, Plan, Spread
from ..registry import Kernel, Unsupported
from ..workload import Workload
from . import limits, makespan, measure, scaling, sharded, spread_backward, spread_forward, topology
from .case import Case, CaseFailed, OutOfMemory, guard
from .identity import identity
from .judge import Problem
from .ranks import Ranks
from .sharded import Calls, SpreadVerdict, Trial

PREPARE = {"forward": spread_forward.prepare, "backward": spread_backward.prepare}


class Spreads:
    """What the ranks of one session check and time together. Every method is called on all ranks alike."""

    def __init__(self, session: Any):
        self.session = session
        self.results: list[dict[str, Any]] = []  # pytest-benchmark's dict of each finished case
        self._answers: tuple[tuple[Problem, int] | None, dict[Any, Any]] = (None, {})
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

    def trial(self, case: Case, form: Form, problem: Problem, alone: bool = True) -> Trial:
        """A form of a case, planned. alone: with the whole problem's kernel, where one rank can do it."""
        problem.mend()  # what the case before wrote on
        if self._answers[0] != (problem, problem.remade):
            self._answers = (problem, problem.remade), {}
        plan = self.plan(case, form, problem)
        whole = self._whole_kernel(case, problem) if alone else None
        return Trial(self.ranks, case, form, problem, plan, whole, self._answers[1])

    def plan(self, case: Case, form: Form, problem: Problem) -> Plan:
        """The plan of this rank, with its kernels compiled and called."""
        selection = self.session.selection
        spread = Spread(
            case.workload,
            case.implementation,
            case.device,
            self.ranks.rank,
            self.ranks.size,
            partial(sharded.local_kernel, case),
            selection.pad_heads,
            selection.overlap_chunks,
            selection.overlap_along,
            selection.overlap_streams,
            selection.seed,
        )

        def alone() -> Plan:
            plan = form.plan(spread)
            with guard(case, "kernel", allowed=True):  # the first call
                share = plan.share(*problem.plain)
                plan.rehearse(share)
                sharded.synchronize(case.device)
            with guard(case, "kernel"):
                sharded.validate_kernels(case, plan, share)
            return plan

        self._agree_on_inputs(problem)
        plan = self.ranks.guarded("planning", alone)
        self.ranks.guarded("connecting", plan.connect, collective=True)
        return plan

    def measure(self, case: Case, form: Form, problem: Problem, benchmark: Any) -> None:
        """Check, then time one form of one case. Skips or fails the test, on all ranks, if it cannot be timed."""
        with self.session.outcome(case):
            if case.direction == "backward" and not case.implementation.backward:
                raise Unsupported("forward only")
            started = time.perf_counter()
            trial = self.trial(case, form, problem)
            build_seconds = time.perf_counter() - started
            calls, verdict = PREPARE[case.direction](trial)
            timing = self._time(trial, calls, benchmark)
            if not benchmark.enabled:
                return
            try:
                facts = self._facts(trial, timing, verdict)
                missing = self._alone_missing or verdict.alone_missing
                self._record(benchmark, facts | {"one_rank_missing": missing, "build_s": build_seconds})
            except BaseException:
                benchmark.has_error = True
                raise

    def gradient_errors(self, case: Case, form: Form, problem: Problem) -> dict[str, float]:
        """dq, dk, dv and dW of every rank against the unsharded answer: the worst rank's worst row, over its budget.

        Skips the test where there is no answer or no backward.
        """
        with self.session.outcome(case):
            found = spread_backward.errors(self.trial(case, form, problem, alone=False))
            return {name: max(errors) for name, errors in found.items()}

    def _time(self, trial: Trial, calls: Calls, benchmark: Any) -> dict[str, makespan.Track]:
        selection = self.session.selection
        rounds = makespan.Rounds(self.ranks, self.session.clock, calls)
        timed = partial(rounds.run, benchmark, selection.rounds, selection.warmup_rounds)
        return trial.settled("timing", timed, collective=True)

    def _facts(self, trial: Trial, timing: dict[str, makespan.Track], verdict: SpreadVerdict) -> dict[str, Any]:
        """The case's extra_info."""
        case, seconds, size = trial.case, timing["ranks"].median, self.ranks.size
        clock, track = self.session.clock, timing["ranks"]
        found = scaling.of_rounds(timing, clock)
        # what ranks tell one another stands between guarded phases, never within one
        cost = self.ranks.guarded("the cost of a call", partial(measure.cost, track.call, clock, track.median), collective=True)
        mine = scaling.OnRank(cost["peak_bytes"], found["sm_mhz_median"], found["sm_clock_unsteady"])
        found["host_us"], everyone = cost["host_us"], self.ranks.exchange(mine)
        probing = partial(scaling.facts, trial.plan, case.direction, timing, found, everyone, self.probe)
        facts = self.ranks.guarded("probing", probing, collective=True)
        self.ranks.guarded("physics", lambda: self.session.reject_impossible(case, seconds, size))
        facts |= {"strategy": trial.form.strategy, "form": trial.form.name, **trial.plan.options}
        facts |= identity(case, self.session.selection, seconds)
        if gpu := self.session.datasheet:
            limit = limits.roofline(case.workload, case.direction, gpu, limits.Ceiling(0, 0))
            facts |= {"limit_s": limit.seconds / size, "percent_of_limit": 100 * limit.seconds / size / seconds}
        return facts | {
            "error_over_budget": verdict.error_over_budget,
            "unsharded_error_over_budget": verdict.unsharded_error_over_budget,
            "world_size": size,
            "nodes": self.ranks.nodes,
        }

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
        sums = self.ranks.guarded("inputs", partial(sharded.sums, problem))
        if any(one != sums for one in self.ranks.exchange(sums)):
            raise CaseFailed("the ranks generated different inputs from one seed: give them devices of one kind")
        self._same_inputs.add(problem.workload)

    def _whole_kernel(self, case: Case, problem: Problem) -> Kernel | None:
        """The same implementation's kernel for the whole problem; None where one rank cannot do it alone."""

        def alone() -> Kernel | None:
            self._alone_missing = ""
            try:
                return problem.build(case).kernel
            except (OutOfMemory, Unsupported) as error:  # the parts may still run
                self._alone_missing = str(error).partition("\n")[0]
                return None

        kernel = self.ranks.guarded("one rank alone", alone)
        self._alone_missing = next(filter(None, self.ranks.exchange(self._alone_missing)), "")
        return None if self._alone_missing else kernel
