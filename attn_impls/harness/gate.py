"""python -m attn_impls gate: two versions run alternately; a case fails only where pairs of runs prove it slower."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from . import compare, injected, saved, sides
from .evidence import MIN_PAIRS, MIN_SPREAD, REGRESSED
from .pairing import Comparison, percent
from .pairing import compare as judged
from .saved import Key, Run
from .sides import Side, SideFailed

PAIRS = 5
LEAST_FLOOR = 0.01
CANNOT_SAY = 2
ENDINGS = {0: "passed", 1: "FAILED", CANNOT_SAY: "CANNOT SAY"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a git ref, a virtual environment (a folder with bin/python), or a file for --impl"
    parser.add_argument("--baseline", metavar="A", help=what)
    parser.add_argument("--candidate", metavar="B", help="the same; held against A")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help="runs of each (default: %(default)s, at least 3)")
    parser.add_argument("--cheap", action="store_true", help=f"{MIN_PAIRS} pairs, the others only of cases that look slower")
    parser.add_argument("--calibrate", action="store_true", help="A against itself: what floor this machine needs")
    parser.add_argument(
        "--prove", metavar="NAME,NAME", help="these implementations against themselves with 2, 5 and 10 %% more work"
    )
    parser.add_argument("--keep", metavar="FOLDER", help="leave the runs' JSON and output there")
    parser.add_argument("arguments", nargs="*", metavar="-- PYTEST-ARGUMENTS", help="what to run, as for pytest --benchmark-only")
    compare.add_judging(parser)


def command(given: argparse.Namespace) -> int:
    """0: no case failed; 1: one did; 2: it cannot be told. Raises ValueError with one line on what was given wrongly."""
    _refuse(given)
    try:
        with _ending_cleanly(), contextlib.ExitStack() as stack:
            folder = (
                Path(given.keep) if given.keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attn-impls-")))
            )
            folder.mkdir(parents=True, exist_ok=True)
            baseline, candidate = given.baseline, given.baseline if given.calibrate else given.candidate
            if given.prove:
                baseline, candidate = injected.write(given.prove.split(","), folder)
            found = _run(given, *stack.enter_context(sides.opened(baseline, candidate)), folder.resolve())
    except SideFailed as error:
        print(f"gate: CANNOT SAY: {error}", file=sys.stderr)
        return CANNOT_SAY
    except KeyboardInterrupt:
        print("gate: interrupted; what it had started and checked out is gone", file=sys.stderr)
        return 130
    return _report(given, found)


def _refuse(given: argparse.Namespace) -> None:
    if given.pairs < MIN_PAIRS:
        raise ValueError(f"--pairs {given.pairs}: give {MIN_PAIRS} or more; fewer give no interval")
    wanted = () if given.prove else ("baseline",) if given.calibrate else ("baseline", "candidate")
    for name in ("baseline", "candidate"):
        if (name in wanted) != bool(getattr(given, name)):
            raise ValueError("give --baseline A --candidate B, or --calibrate --baseline A, or --prove NAME")


def _run(given: argparse.Namespace, a: Side, b: Side, folder: Path) -> Comparison:
    first = MIN_PAIRS if given.cheap else given.pairs
    runs = _Alternation(a, b, folder, given.pairs)
    for _ in range(first):
        runs.pair(given.arguments)
    found = judged(*runs.done, given.floor)
    suspects = found.suspects
    if not suspects or first == given.pairs:
        return found
    cleared = [case.fullname for key, case in runs.done[0][0].cases.items() if key not in suspects]
    arguments = [*given.arguments, *(word for name in cleared for word in ("--deselect", name))]
    runs.say(f"{len(suspects)} of {len(found.rows)} cases look slower: {given.pairs - first} more pairs of them")
    for _ in range(given.pairs - first):
        runs.pair(arguments, suspects)
    a_runs, b_runs = ([run.only(suspects) for run in side] for side in runs.done)
    return found.refined(judged(a_runs, b_runs, given.floor))


class _Alternation:
    """The runs so far, AB, BA, AB, …; the cases that a run owes are those of the first."""

    def __init__(self, a: Side, b: Side, folder: Path, pairs: int):
        self.sides, self.folder, self.pairs = (a, b), folder, pairs
        self.done: tuple[list[Run], list[Run]] = ([], [])
        self.seconds: list[float] = []

    def pair(self, arguments: list[str], owed: set[Key] | None = None) -> None:
        number = len(self.done[0])
        for n in (0, 1) if number % 2 == 0 else (1, 0):
            self._run(n, number, arguments, owed)
        if difference := saved.incomparable(self.done[0][-1], self.done[1][-1]):
            raise ValueError(difference)

    def _run(self, n: int, number: int, arguments: list[str], owed: set[Key] | None) -> None:
        side, output = self.sides[n], self.folder / f"{'AB'[n]}{number + 1}.json"
        started = time.monotonic()
        run = side.run(arguments, output)
        if owed is None:
            owed = set(self.done[0][0].cases) if self.done[0] else set()
        if lost := owed - run.cases.keys():
            names = ", ".join(f"{key.workload} {key}" for key in sorted(lost)[:3])
            raise side.failed(f"lost {len(lost)} of {len(owed)} cases ({names})", output)
        self.done[n].append(run)
        self.seconds.append(time.monotonic() - started)
        left = statistics.fmean(self.seconds) * (2 * self.pairs - len(self.seconds))
        self.say(f"pair {number + 1} of {self.pairs}: {side.name} {self.seconds[-1]:.0f} s, at most {left:.0f} s left")

    def say(self, text: str) -> None:
        print(f"gate: {text}", file=sys.stderr, flush=True)


def _report(given: argparse.Namespace, found: Comparison) -> int:
    lines = list((compare.markdown if given.markdown else compare.text)(found))
    code = CANNOT_SAY if found.moved else 0
    if given.prove:
        lines += ["", *injected.rates(found)]
    elif given.calibrate:
        lines += ["", *_calibration(found)]
    else:
        code, why = _verdict(found)
        lines.append(f"gate: {ENDINGS[code]}{why}")
    print("\n".join(lines))
    return code


def _verdict(found: Comparison) -> tuple[int, str]:
    """The exit code, and what of the control explains it. A case that is proven slower fails beside a restless control too."""
    if found.moved:
        there = _controls(found, found.moved)
        return CANNOT_SAY, f": the fixed matmul took another time on the two sides ({there}): the machine or its cuBLAS changed"
    if found.code == 0 and found.restless:
        return (
            CANNOT_SAY,
            f": the fixed matmul's time wanders ({_controls(found, found.restless)}): the machine is too busy",
        )
    return found.code, ""


def _controls(found: Comparison, dtypes: list[str]) -> str:
    return ", ".join(f"{dtype} {percent(found.controls[dtype].change)}" for dtype in dtypes)


def _calibration(found: Comparison) -> Iterator[str]:
    """The floor that the median of so many pairs of the noisiest case passes once in a thousand times without a change."""
    spreads = {row.key: max(row.evidence.spread, MIN_SPREAD) for row in found.rows if row.evidence}
    if not spreads:
        return
    noisiest = max(spreads, key=spreads.__getitem__)
    reach = statistics.NormalDist().inv_cdf(0.999) * math.sqrt(math.pi / 2 / found.pairs)  # of a median, in spreads
    needed = max(LEAST_FLOOR, math.expm1(reach * spreads[noisiest]))
    yield f"one pair of the noisiest case spreads {100 * spreads[noisiest]:.2g} % ({noisiest.workload} {noisiest})"
    yield f"the same against itself: {len(found.of(REGRESSED))} of {len(spreads)} cases would have failed"
    yield f"floor for {found.pairs} pairs here: --floor {100 * needed:.2g}"


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let a SIGTERM end the gate as a Ctrl-C does."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
