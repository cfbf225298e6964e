"""What pytest's hooks do, called by conftest.py: the run's setup, its tests, its reports and its summary."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ..registry import Implementation
from ..workload import Workload
from . import environment, matrix, options, progress, rank_start, resume, selection, summary, workers
from .case import direction_of, group, ungrouped
from .ranks import launched_by
from .session import Session
from .watchdog import Watchdog

SESSION: pytest.StashKey[Session] = pytest.StashKey()
WATCHDOG: pytest.StashKey[Watchdog] = pytest.StashKey()


def configure(config: pytest.Config) -> None:
    """Resolve the options; every usage error is raised here, before anything runs or is written."""
    gc.freeze()  # torch's modules stay as long as the run: no collection need go through them
    gc.disable()  # nor through thousands of tests while they are made
    ranks = rank_start.meet(config)
    workers.refuse_benchmarks(config)
    selected = rank_start.agreed(ranks, lambda: selection.resolve(options.read_options(config)))
    session = Session(config, selected, ranks)
    config.stash[SESSION] = session
    session.resumed = rank_start.agreed(ranks, lambda: resume.find(config, session))
    if progress.wanted(config):
        known = set(session.resumed.cases) if session.resumed else set()
        config.pluginmanager.register(progress.Progress(config, known), "attention-progress")
    alone = not float(config.getini("faulthandler_timeout") or 0)
    config.stash[WATCHDOG] = Watchdog(selected.case_timeout, lambda case: _on_hang(config, case), backstop=alone)
    rank_start.connect(config, session)


def session_of(config: pytest.Config) -> Session:
    return config.stash[SESSION]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Workload × implementation, workload outermost, ids as in test_forward[<workload>-<implementation>]."""
    session = session_of(metafunc.config)
    selected, marker = session.selection, metafunc.definition.get_closest_marker("distributed")
    # without ranks the distributed tests are left out: one of each stands for the thousands that need not be made
    made = slice(1) if marker and not session.ranks else slice(None)
    rare = metafunc.definition.get_closest_marker("rare")
    if "workload" in metafunc.fixturenames:
        more = selected.also_checked if metafunc.definition.get_closest_marker("correctness") else ()
        workloads = selected.rare if rare else (*selected.workloads, *more)
        metafunc.parametrize("workload", workloads[made], ids=str, indirect=True, scope="module")
    if "form" in metafunc.fixturenames:
        assert marker, "a test over forms is distributed, and its marker names the strategy"
        metafunc.parametrize("form", selected.forms[marker.kwargs["strategy"]][made], ids=lambda form: form.name)
    if "implementation" in metafunc.fixturenames:
        implementations = [one for one in selected.implementations if not (rare and (one.compiles or session.unavailable(one)))]
        implementations = implementations[made]
        metafunc.parametrize("implementation", implementations, ids=[one.name for one in implementations], indirect=True)


def mark_collected(item: pytest.Item) -> None:
    """Mark as slow what compiles anew for a workload that no benchmark needs."""
    callspec = getattr(item, "callspec", None)
    if not callspec or not {"workload", "implementation"} <= set(callspec.params) or _of_nothing(item):
        return
    workload, implementation = callspec.params["workload"], callspec.params["implementation"]
    if implementation.compiles and workload in session_of(item.config).selection.also_checked:
        item.add_marker(pytest.mark.slow)


def modify_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give benchmarks their timer and group; leave out what cannot run in this kind of run."""
    session = session_of(config)
    gone = [item for item in items if _left_out(config, item) or _of_another_direction(session, item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]
    for item in items:
        if item.get_closest_marker("gpu") and session.device != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "benchmark" not in getattr(item, "fixturenames", ()):
            continue
        if workers.in_parallel(config):
            item.add_marker(pytest.mark.skip(reason=workers.REASON))
        elif case := _case_of(item):
            item.add_marker(pytest.mark.benchmark(group=case[0], timer=_Timer(session)))


def collection_finished() -> None:
    gc.enable()


class _Timer:
    """The session's clock as pytest-benchmark's timer; the clock starts the device, so it is made when first read."""

    def __init__(self, session: Session):
        self.session = session
        self.__name__ = "device_clock" if session.device == "cuda" else "host_clock"

    def __call__(self) -> float:
        return self.session.read_timer()


def _of_nothing(item: pytest.Item) -> bool:
    """Whether pytest made a test of an empty list of workloads or implementations, to skip it."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    kinds = {"workload": Workload, "implementation": Implementation}
    return any(name in params and not isinstance(params[name], kind) for name, kind in kinds.items())


def _left_out(config: pytest.Config, item: pytest.Item) -> bool:
    if _of_nothing(item):
        return True
    # under --benchmark-only, pytest-benchmark would report each of the others as skipped
    return config.getoption("benchmark_only", False) and "benchmark" not in getattr(item, "fixturenames", ())


def _of_another_direction(session: Session, item: pytest.Item) -> bool:
    """Whether a test over cases is of a direction that was not selected. Gradients are checked if either kind is."""
    if _case_of(item) is None:
        return False
    direction = direction_of(item)
    if "benchmark" in getattr(item, "fixturenames", ()):
        return direction not in session.selection.directions
    return not any(direction in selected for selected in session.selection.checked)


def _case_of(item: pytest.Item) -> tuple[str, str] | None:
    """(group, implementation) of a test over cases."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "workload" in params and "implementation" in params:
        return group(params["workload"], direction_of(item)), params["implementation"].name
    return None


def report_header(config: pytest.Config) -> list[str]:
    selected = session_of(config).selection
    if selected.device == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"no GPU in use, CPU implementations only (torch threads: {torch.get_num_threads()})"
    lines = [f"attention: {device}, torch {torch.__version__}, seed {selected.seed}"]
    if selected.cpu_rule:
        lines.append(f"CPU-sized presets: {selected.cpu_rule}")
    if selected.also_checked and not config.getoption("benchmark_only", False):
        also = f"{len(selected.also_checked)} workloads that are not timed (adversarial-…), and {len(selected.rare)} rarer ones"
        lines.append(f"correctness tests: also on {also}")
    if resumed := session_of(config).resumed:
        lines.append(resumed.describe())
    return lines


def report_status(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """Call a case that an earlier run has finished "resumed", and not "passed"."""
    resumed = session_of(config).resumed
    if resumed and report.when == "call" and report.passed and report.nodeid in resumed.taken:
        return "resumed", "r", "RESUMED"
    return None


@contextlib.contextmanager
def watched(item: pytest.Item) -> Iterator[None]:
    """Time-limit a test of an implementation."""
    debugged = item.config.getoption("usepdb", False) or item.config.getoption("trace", False)
    if "implementation" not in getattr(item, "fixturenames", ()) or debugged:
        yield
        return
    watchdog = item.config.stash[WATCHDOG]
    watchdog.start(item.nodeid)
    try:
        yield
    finally:
        watchdog.stop()


def note_report(item: pytest.Item, report: pytest.TestReport) -> None:
    """Remember why a case did not run, say how to run a failed test alone, and stop if the device is lost."""
    session = session_of(item.config)
    case = _case_of(item) if "benchmark" in getattr(item, "fixturenames", ()) else None  # the table is of what was to be timed
    if report.failed:
        report.sections.append(("rerun this one alone", rerun_command(item.config, item.nodeid)))
    if case and report.skipped and isinstance(report.longrepr, tuple):
        _leave_out(session, case, report.longrepr[2].removeprefix("Skipped: "))
    if case and report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        for prefix in ("AssertionError: ", "Failed: ", f"{case[1]}: ", f"{case[1]} "):
            text = text.removeprefix(prefix)
        _leave_out(session, case, f"FAILED: {text}")
    if session.lost and report.failed:
        item.session.shouldfail = f"the CUDA device is lost, nothing more can run: {session.lost}"


def _leave_out(session: Session, case: tuple[str, str], reason: str) -> None:
    if session.ranks:
        return  # told by all ranks together
    workload, direction = ungrouped(case[0])
    session.leave_out(reason, workload=workload, direction=direction, implementation=case[1])


def rerun_command(config: pytest.Config, nodeid: str) -> str:
    """The command line that runs one test of this run again, with the options that this run had."""
    arguments = [a for a in config.invocation_params.args if isinstance(a, str)]
    kept: list[str] = []
    valued = {option.flag: bool(option.metavar) for option in options.OPTIONS}
    for n, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in valued:
            kept += arguments[n : n + 2] if valued[flag] and not value else [argument]
    file, _, test = nodeid.partition("::")
    path = os.path.relpath(config.rootpath / file, config.invocation_params.dir)
    return shlex.join([*launched_by(), "pytest", f"{path}::{test}", *kept])


def _on_hang(config: pytest.Config, case: str) -> None:
    """From the watchdog's thread: keep what is finished, since this process ends without pytest's own ending."""
    session = session_of(config)
    say = config.stash[WATCHDOG].say
    session.journal.keep(config.getoption("benchmark_json", None), say)
    say(f"rerun this one alone: {rerun_command(config, case)}")


def known_machine_info(config: pytest.Config) -> dict[str, Any] | None:
    """The machine_info made earlier in this run, if it was."""
    session = config.stash.get(SESSION, None)
    return session.__dict__.get("machine_info") if session else None


def update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    session = session_of(config)
    environment.update_machine_info(machine_info, session.device, list(selection.REGISTRY.values()))


def update_json(config: pytest.Config, document: dict[str, Any]) -> None:
    """Say in the JSON why cases did not run, so that a report of it can."""
    document["not_run"] = session_of(config).not_run


def refuse_other_device(machine_info: dict[str, Any], compared: dict[str, Any]) -> None:
    """Raise pytest.UsageError where a comparison would be between two devices."""
    difference = environment.same_device(machine_info, compared["machine_info"])
    if difference:
        raise pytest.UsageError(f"--benchmark-compare: {difference}; compare runs of one device only")


def write_summary(reporter: Any, config: pytest.Config) -> None:
    session = session_of(config)
    if session.ranks:
        matrix.write(reporter, session)
        return
    if not session.results and not (session.not_run and config.getoption("benchmark_only", False)):
        return
    machine = environment.describe(session.machine_info, session.state)
    if session.selection.cpu_rule:
        machine.append(f"CPU-sized presets: {session.selection.cpu_rule}")
    reporter.section("attention", "=", bold=True)
    missing = summary.reasons(session.not_run)
    for line in summary.render(session.results, missing, machine, config.get_terminal_writer().fullwidth):
        reporter.write_line(line.text, **line.style)
