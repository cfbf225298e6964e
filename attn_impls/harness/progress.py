"""How far a run is, behind what pytest prints: cases done, time left, the current case. Gone before pytest prints on."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from . import workers

# DEC's save and restore of the cursor, and ANSI's erasing of what follows it
SAVE, RESTORE, ERASE = "\x1b7", "\x1b8", "\x1b[K"
LEAST_ROOM = 24  # columns below which nothing is shown


def wanted(config: pytest.Config) -> bool:
    """Not where nobody watches (no terminal, a log), where it was asked to be quiet, or where others print in between."""
    watched = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return (
        watched and config.getoption("verbose") >= 0 and config.getoption("capture") != "no" and not workers.in_parallel(config)
    )


class Progress:
    """pytest's hooks: shows the progress while a case runs."""

    def __init__(self, config: pytest.Config, resumed: set[str]):
        self.config = config
        self.resumed = resumed  # test ids that take no time
        self.names: dict[str, str] = {}  # test id: implementation, of the tests over cases
        self.done: set[str] = set()
        self.seconds: dict[str, list[float]] = {}
        self.started = 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            if "workload" in params and "implementation" in params:
                self.names[item.nodeid] = params["implementation"].name

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started = time.monotonic()
        self._show(nodeid)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: Any) -> Iterator[None]:
        _write(ERASE)
        yield
        if report.when == "setup" and report.passed:  # of which pytest prints nothing
            self._show(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self.names:
            self.done.add(nodeid)
            if nodeid not in self.resumed:
                self.seconds.setdefault(self.names[nodeid], []).append(time.monotonic() - self.started)

    def pytest_keyboard_interrupt(self) -> None:
        _write(ERASE)

    def text(self, nodeid: str) -> str:
        left = self.seconds_left()
        case = nodeid.partition("[")[2].removesuffix("]")
        return " · ".join([f"{len(self.done)}/{len(self.names)} cases", *([duration(left)] if left else []), case])

    def seconds_left(self) -> float:
        """Of each case to come: what this implementation's took so far, or else what all did; 0 before the first."""
        if not self.seconds:
            return 0.0
        every = statistics.fmean(seconds for found in self.seconds.values() for seconds in found)
        to_come = [name for nodeid, name in self.names.items() if nodeid not in self.done | self.resumed]
        return sum(statistics.fmean(self.seconds.get(name, [every])) for name in to_come)

    def _show(self, nodeid: str) -> None:
        writer = self.config.get_terminal_writer()
        room = writer.fullwidth - writer.width_of_current_line % writer.fullwidth - 3
        if nodeid in self.names and room >= LEAST_ROOM:
            text = self.text(nodeid)
            _write(f"{SAVE}{ERASE}  {text if len(text) <= room else text[: room - 1] + '…'}{RESTORE}")


def _write(text: str) -> None:
    # past pytest's writer, which would count the columns as its own
    sys.stdout.write(text)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
