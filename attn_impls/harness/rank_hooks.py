"""pytest under torchrun: what rank 0 alone does, and what all ranks decide together. Without torchrun, how to get there."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import topology
from .case import direction_of
from .ranks import Outcome, Ranks, blamed
from .session import Session
from .termination import Termination


class RankHooks:
    """pytest's hooks on one rank of several: every decision is one that all ranks make together."""

    def __init__(self, config: pytest.Config, session: Session, ranks: Ranks):
        self.config, self.session, self.ranks = config, session, ranks
        self.temporary: Path | None = None
        self.collection_errors: list[str] = []
        self.nothing_ran = False
        self.status = 1
        self.lost = ""
        self.stderr = os.dup(2)  # the real one: pytest captures 2 while a test runs
        self.termination = Termination(self._told_to_end, self._last_words) if ranks.rank == 0 else None
        ranks.on_stall = self._on_stall  # type: ignore[method-assign]

    def pytest_report_header(self) -> str:
        ranks, s = self.ranks, "s" * (self.ranks.nodes != 1)
        return f"ranks: {ranks.size} on {ranks.nodes} node{s}, {ranks.backend}; they wait {ranks.timeout:g} s for one another"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        # whatever -m says: a test in which each rank decides for itself would leave them waiting for one another
        gone = [item for item in items if not item.get_closest_marker("distributed")]
        if gone:
            config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if item.get_closest_marker("distributed")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        nodeids = [item.nodeid for item in session.items]
        digest = hashlib.sha256("\n".join(nodeids).encode()).hexdigest()
        if len(set(self.ranks.exchange((len(nodeids), digest)))) == 1:
            return
        everyone = self.ranks.exchange((nodeids, self.collection_errors))
        pytest.exit(_difference(everyone), returncode=4)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.ranks.phase = f"{item.nodeid} (setup)"
        if self.ranks.poison:
            pytest.fail(self.ranks.poison, pytrace=False)

    # innermost, so that every other wrapper sees the outcome that the ranks agreed on
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        self.ranks.phase = f"{item.nodeid} ({report.when})"
        outcomes = self.ranks.exchange(_outcome(report))
        for kind in ("failed", "skipped"):
            reason = blamed(outcomes, kind)
            if reason and report.outcome != kind:
                report.outcome = kind
                report.longrepr = reason if kind == "failed" else (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
            elif kind == "failed" and reason and len({outcome.text for outcome in outcomes}) > 1:
                report.sections.append(("by rank", reason))
            if reason:
                break
        if "failed" in {outcome.kind for outcome in outcomes}:
            self.ranks.suspect(item.nodeid, outcomes)
        self._note(item, report)
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if report.failed and benchmark is not None:
            benchmark.has_error = True  # or rank 0 would save what another rank disowned
        return report

    def _note(self, item: pytest.Item, report: Any) -> None:
        """Remember why a cell of the matrix is empty."""
        params = getattr(getattr(item, "callspec", None), "params", {})
        timed = "benchmark" in getattr(item, "fixturenames", ())
        if report.passed or not timed or not {"workload", "form", "implementation"} <= params.keys():
            return
        first = str(report.longrepr).strip().splitlines()[0]
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else f"FAILED: {first}"
        cell = {"workload": str(params["workload"]), "direction": direction_of(item)}
        cell |= {"form": params["form"].name, "implementation": params["implementation"].name}
        self.session.leave_out(reason, **cell)

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        machine_info.update(topology.facts(self.ranks))

    def pytest_benchmark_compare_machine_info(self, compared_benchmark: dict[str, Any]) -> None:
        here, there = self.ranks.size, compared_benchmark["machine_info"].get("world_size")
        if there != here:
            raise pytest.UsageError(f"--benchmark-compare: this run is on {here} ranks, that one was on {there or 'none'}")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Also where pytest.exit ends up, and with it a rank that was lost."""
        self._end_early(str(excinfo.value) or type(excinfo.value).__name__)

    def pytest_internalerror(self, excrepr: object) -> None:
        self._end_early(str(excrepr))

    def _end_early(self, why: str) -> None:
        self.lost = why
        self.ranks.leave(why)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.nothing_ran = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        if self.nothing_ran:  # torchrun takes every other status for a crash
            session.exitstatus = pytest.ExitCode.OK
        self.status = int(session.exitstatus)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.nothing_ran:
            terminalreporter.write_line(
                "no distributed test was selected: nothing ran (exit 0, or torchrun would report a crash)"
            )
            if self.session.selection.directions == ("forward+backward",):
                terminalreporter.write_line("forward+backward is timed on one GPU only: give --direction forward or backward")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        clean = not self.lost and not self.ranks.poison
        self.ranks.close(clean)
        if self.termination:
            self.termination.finished.set()
        if self.temporary and self.ranks.local_rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if not clean:  # the groups hold threads that may never end, and would abort this process as it goes
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status or 1)

    def _told_to_end(self) -> None:
        self.ranks.ending = "torchrun told this run to end (SIGTERM)"

    def _last_words(self) -> None:
        """The process ends without pytest's own ending: say who is gone, and keep what is finished."""
        gone = self.ranks.gone()
        self._say(f"\n\nEND of rank 0 in {self.ranks.phase}: {self.ranks.ending or 'a rank is stuck'}")
        for rank, why in gone.items():
            self._say(f"rank {rank}: {why}")
        self.session.journal.keep(self.config.getoption("benchmark_json", None), self._say)

    def _on_stall(self, why: str) -> None:
        self.ranks.leave(why)
        if self.ranks.rank == 0:
            time.sleep(2.0)  # whoever is stuck with us says so now
            self._say(f"\n\nrank 0: {why}")
            self._last_words()
        os._exit(1)

    def _say(self, text: str) -> None:
        os.write(self.stderr, f"{text}\n".encode())


def _outcome(report: Any) -> Outcome:
    if report.skipped and isinstance(report.longrepr, tuple):
        return Outcome("skipped", report.longrepr[2].removeprefix("Skipped: "))
    text = str(report.longrepr) if report.failed else ""
    output = "".join(f"\n--- {title} ---\n{content}" for title, content in report.sections if report.failed and content)
    return Outcome(report.outcome, text + output)


def _difference(everyone: list[tuple[list[str], list[str]]]) -> str:
    """What each rank collected that rank 0 did not, and the other way round."""
    lines = ["the ranks collected different tests:"]
    first = everyone[0][0]
    for rank, (nodeids, errors) in enumerate(everyone):
        extra = [nodeid for nodeid in nodeids if nodeid not in set(first)]
        lacking = [nodeid for nodeid in first if nodeid not in set(nodeids)]
        reordered = not extra and not lacking and nodeids != first
        lines.append(f"rank {rank}: {len(nodeids)} tests" + ", in another order" * reordered)
        lines += [f"  only there: {nodeid}" for nodeid in extra[:5]] + [f"  not there: {nodeid}" for nodeid in lacking[:5]]
        lines += [f"  {error}" for error in errors]
    return "\n".join(lines)
