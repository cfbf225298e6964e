"""One run: the device and its clock, what has been checked and measured so far, and the case at hand."""

from __future__ import annotations

import contextlib
import datetime
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest
import torch

from ..registry import REGISTRY, Implementation, Kernel, Unsupported
from . import environment, journal, limits, makespan, measure, probes, profile, resume
from .calibration import Overhead, calibrate
from .case import Broken, Case, CaseFailed, DeviceLost, forget, guard, out_of_memory, release
from .clock import Clock, CudaDriver, DeviceClock, HostClock
from .identity import identity
from .journal import Journal
from .judge import Problem
from .outputs import Outputs
from .ranks import Ranks
from .selection import Selection
from .spread import Spreads
from .verdict import Verdict


class Session:
    """What lives as long as the run. Everything that touches the device is made when first needed."""

    def __init__(self, config: pytest.Config, selection: Selection, ranks: Ranks | None = None):
        self.config, self.selection, self.ranks = config, selection, ranks
        self.device = selection.device
        self.journal = Journal(journal.folder(config.rootpath), resume.here(selection))
        self.resumed: resume.Resumed | None = None
        self.results: list[dict[str, Any]] = []  # pytest-benchmark's dict of each finished case
        self._left_out: dict[tuple[str, ...], dict[str, str]] = {}
        self.broken: dict[str, str] = {}
        self.lost = ""  # the culprit of a sticky CUDA error
        self._checked: dict[Case, tuple[Verdict, float]] = {}
        self._probed: dict[str, dict[str, str]] = {}  # implementation: its answers
        self._ceilings: dict[torch.dtype, limits.Ceiling] = {}

    @cached_property
    def clock(self) -> Clock:
        if self.ranks:
            return makespan.clock(self.ranks, self._driver if self.device == "cuda" else None, lambda: self.overhead)
        on_cpu = self.device == "cpu"
        return HostClock() if on_cpu else DeviceClock(self._driver, self.overhead.seconds, self.overhead.empty_spin)

    def read_timer(self) -> float:
        """pytest-benchmark's timer: the clock, or the rounds of a case that an earlier run has finished."""
        return self.resumed.read_timer() if self.resumed and self.resumed.playing else self.clock()

    @cached_property
    def overhead(self) -> Overhead:
        return calibrate(self._driver, profile.empty_spin_seconds)

    @cached_property
    def spreads(self) -> Spreads:
        """Cases that several ranks run together."""
        return Spreads(self)

    @cached_property
    def _driver(self) -> CudaDriver:
        return CudaDriver()

    @cached_property
    def datasheet(self) -> limits.Gpu | None:
        return limits.DATASHEETS.get(torch.cuda.get_device_name()) if self.device == "cuda" else None

    @cached_property
    def machine_info(self) -> dict[str, Any]:
        """pytest-benchmark's machine_info with our additions, made once: a broken device could not tell it later."""
        info = self.config.hook.pytest_benchmark_generate_machine_info(config=self.config)
        environment.update_machine_info(info, self.device, list(REGISTRY.values()))
        return info

    @cached_property
    def state(self) -> dict[str, Any]:
        return environment.state(self.device)

    @cached_property
    def header(self) -> dict[str, Any]:
        """A pytest-benchmark JSON document without its benchmarks."""
        import pytest_benchmark

        return {
            "machine_info": self.machine_info,
            "commit_info": self.config.hook.pytest_benchmark_generate_commit_info(config=self.config),
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "version": pytest_benchmark.__version__,
        }

    def ceiling(self, dtype: torch.dtype) -> limits.Ceiling:
        if dtype not in self._ceilings:
            self._ceilings[dtype] = limits.measure_ceiling(self.clock, self.device, dtype)
        return self._ceilings[dtype]

    def unavailable(self, implementation: Implementation) -> str:
        """Why an implementation cannot be tried on this device or any more, or ""."""
        return implementation.unavailable(self.device) or self.broken.get(implementation.name, "")

    def admit(self, case: Case) -> None:
        """Skip a case whose implementation is unavailable; fail it if the implementation is required."""
        reason = self.unavailable(case.implementation)
        if reason and case.implementation.name in self.selection.required:
            pytest.fail(f"{case.implementation.name} is required (--require-impl): {reason}", pytrace=False)
        if reason:
            pytest.skip(f"{case.implementation.name}: {reason}")

    def verdict(self, case: Case, problem: Problem) -> Verdict:
        """The case's verdict, computed once a session. Skips or fails the test if there can be none."""
        if case not in self._checked:
            with self.outcome(case):
                self._prepare(case, problem)
        return self._checked[case][0]

    def measure(self, case: Case, problem: Problem, benchmark: Any) -> None:
        """Check, then time the case, and record everything about it. Skips or fails the test if it cannot be timed."""
        if self.resumed and (result := self.resumed.play(benchmark)):
            self.results.append(result)
            return
        with self.outcome(case):
            self._measure(case, problem, benchmark)

    def answers(self, implementation: Implementation) -> dict[str, str]:
        """What an implementation answers to the probes. Skips or fails the test if it cannot be asked."""
        case = Case(probes.PROBES[0].workload, implementation, self.device)
        self.admit(case)
        with self.outcome(case):
            self._answers(implementation)
        return self._probed[implementation.name]

    def _answers(self, implementation: Implementation) -> dict[str, str]:
        """The same, asked once a session; the more its cases took to build so far, the less."""
        name = implementation.name
        if name not in self._probed:
            built = [seconds for case, (_, seconds) in self._checked.items() if case.implementation is implementation]
            self._probed[name] = probes.ask(implementation, self.device, max(built, default=0.0))
        return self._probed[name]

    @contextlib.contextmanager
    def outcome(self, case: Case) -> Iterator[None]:
        """Turn what a case raises into pytest's outcome, and free its memory."""
        failure, skipped = None, None
        try:
            yield
        except Unsupported as error:
            skipped = error
            forget(error)
        except CaseFailed as error:
            failure = error
            forget(error)  # a report keeps them
        except torch.OutOfMemoryError as error:
            failure = CaseFailed(f"the check of {case.workload} ran out of memory: {out_of_memory(error)}")
            forget(error)
        release(self.device, failure)
        if isinstance(failure, Broken):
            self.broken[case.implementation.name] = str(failure).splitlines()[0]
        if isinstance(failure, DeviceLost):
            self.lost = str(failure).splitlines()[0]
        if skipped:
            raise pytest.skip.Exception(f"{case.implementation.name}: {skipped}") from None
        if failure:
            raise pytest.fail.Exception(str(failure), pytrace=False) from None

    def _prepare(self, case: Case, problem: Problem) -> Kernel:
        """Build the case's kernel, and check it unless this session has: its output or, for a backward case, its gradients."""
        if case.direction != "forward" and not case.implementation.backward:
            raise Unsupported("forward only")
        kernel, build_seconds, out = problem.build(case)
        if case not in self._checked:
            started = time.perf_counter()
            if case.direction == "forward":
                verdict = problem.judge(case, kernel, out)
            else:
                del out
                first = problem.first_pass(case, kernel)
                build_seconds += time.perf_counter() - started
                verdict = problem.judge_gradients(case, kernel, first)
            self._checked[case] = verdict, build_seconds
        return kernel

    def _approved(self, case: Case, problem: Problem) -> tuple[Kernel, bool]:
        """The kernel, checked and probed, and whether SDPA failed the check. Raises CaseFailed where it may not be timed."""
        name, sdpa_is_wrong = case.implementation.name, False
        for checked in dict.fromkeys((replace(case, direction="forward"), case)):
            kernel = self._prepare(checked, problem)
            verdict, _ = self._checked[checked]
            sdpa_is_wrong |= verdict.sdpa_is_wrong
            if verdict.disqualified:
                raise CaseFailed(f"{name} {verdict.disqualified}; it is not timed")
        asked_now = name not in self._probed
        answers = self._answers(case.implementation)
        if asked_now:
            kernel = self._prepare(case, problem)  # a builder that resets a compiler has undone the first one
        if objection := probes.objection(answers, case.workload):
            raise CaseFailed(f"{name} {objection}; it is not timed")
        return kernel, sdpa_is_wrong

    def _measure(self, case: Case, problem: Problem, benchmark: Any) -> None:
        if benchmark.enabled:
            self.ceiling(case.workload.dtype)  # takes 4 GiB, which beside the case's tensors may not be there
        kernel, sdpa_is_wrong = self._approved(case, problem)
        name, layout = case.implementation.name, case.implementation.layout
        (verdict, build_seconds), answers = self._checked[case], self._probed[name]
        call = problem.call(case, kernel)
        baseline = None if sdpa_is_wrong else self._baseline(case, problem)
        outputs = Outputs(case, problem, call)
        with _nothing_saved_unless_whole(benchmark), problem.handing_out(layout):
            with guard(case, "kernel"):
                rounds = self.selection.rounds, self.selection.warmup_rounds
                timing = measure.run(benchmark, self.clock, call, baseline, *rounds, outputs.see, outputs.turn)
            wrong = outputs.failure()
            facts: dict[str, Any] = {}
            if benchmark.enabled:
                self.reject_impossible(case, timing.median)
                with guard(case, "kernel"):
                    facts = measure.facts(timing, self.clock) | measure.cost(call, self.clock, timing.median)
                    facts["kernels"] = profile.kernel_names(call, self.device)
            if complaint := problem.changed(layout):
                raise CaseFailed(f"{name} {complaint} while it was timed")
            if wrong:
                raise CaseFailed(f"{name} {wrong}")
            if not benchmark.enabled:
                return
            ceiling = self.ceiling(case.workload.dtype)
            facts |= limits.facts(case.workload, case.direction, self.datasheet, ceiling, timing.median) | verdict.facts
            facts |= identity(case, self.selection, timing.median)
            facts |= {"build_s": build_seconds, "probes": probes.brief(answers)}
            if case.implementation.dispatches:
                facts["chosen"] = profile.chosen(facts["kernels"])
            if name == "sdpa":
                facts["vs_sdpa"] = 1.0
            # pytest-benchmark would store their repr, with addresses and paths
            benchmark.stats.params = {"workload": str(case.workload), "implementation": name}
            benchmark.extra_info.update(facts)
            self.results.append(benchmark.stats.as_dict())
            self.keep(self.results[-1])

    def keep(self, result: dict[str, Any]) -> None:
        """Write a finished case to the journal. Where that fails it is still in memory, and pytest-benchmark saves it."""
        with self._journaling():
            self.journal.add(self.header, result)

    def leave_out(self, reason: str, **cell: str) -> None:
        """Remember why a case has no time. cell: workload, direction, implementation and, on several ranks, form."""
        if tuple(cell.values()) in self._left_out:
            return
        self._left_out[tuple(cell.values())] = cell | {"reason": reason}
        with self._journaling():
            self.journal.leave_out(cell | {"reason": reason})

    @property
    def not_run(self) -> list[dict[str, str]]:
        """The cases that have no time, each with the reason; the first where there were several."""
        return list(self._left_out.values())

    @contextlib.contextmanager
    def _journaling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            warnings.warn(f"no journal of this run: {error}", stacklevel=4)

    def _baseline(self, case: Case, problem: Problem) -> Any:
        """The SDPA call to pair with; None for SDPA itself and where SDPA has no right answer to this workload."""
        known = problem.sdpa if case.direction == "forward" else problem.sdpa_gradients
        if case.implementation.name == "sdpa" or known is None:
            return None
        sdpa = replace(case, implementation=REGISTRY["sdpa"])
        with guard(sdpa, "builder"), torch.device(self.device):
            return problem.call(sdpa, sdpa.implementation(case.workload))

    def reject_impossible(self, case: Case, seconds: float, gpus: int = 1) -> None:
        """Raise CaseFailed for a time in which this many GPUs could not have done the work."""
        if self.device != "cuda":
            return
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        bound = limits.physical_bound(case.workload, case.direction, self.datasheet, sms, environment.max_sm_mhz()) / gpus
        if seconds < bound:
            raise CaseFailed(
                f"{case.implementation.name} took {seconds * 1e6:.2f} µs, and physics needs {bound * 1e6:.2f} µs: "
                "timing did not wait for the kernel, or the FLOP count is wrong"
            )


@contextlib.contextmanager
def _nothing_saved_unless_whole(benchmark: Any) -> Iterator[None]:
    """On any exception, a Ctrl-C included, keep pytest-benchmark from saving rounds that lack their rest."""
    try:
        yield
    except BaseException:
        benchmark.has_error = True
        raise
