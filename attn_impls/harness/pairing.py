"""Two runs, or several pairs of runs, case by case: slower, faster, the same, or not to be told."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import saved
from .evidence import CHANGED, IMPROVED, INCONCLUSIVE, MIN_PAIRS, REGRESSED, SAME, Evidence, judge
from .saved import Key, Measured, Run

NEW, REMOVED = "NEW", "REMOVED"
VERDICTS = (REGRESSED, INCONCLUSIVE, REMOVED, NEW, IMPROVED, SAME)  # in the order they are shown

Pairs = list[tuple[Measured, Measured]]


class Group(NamedTuple):
    """The cases that are timed against one and the same SDPA call."""

    workload: str
    direction: str


@dataclass(frozen=True)
class Row:
    """One case, judged."""

    key: Key
    verdict: str
    evidence: Evidence | None = None
    basis: str = ""  # "vs sdpa", "time" or "makespan": whose ratio was judged
    pairs: int = 0
    seconds: tuple[float | None, float | None] = (None, None)  # medians over the runs: baseline, candidate
    reason: str = ""  # why it is not to be told

    @property
    def cannot_say(self) -> bool:
        """Whether something stood in the way, as opposed to too wide an interval."""
        return bool(self.reason)


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    floor: float
    pairs: int
    controls: dict[str, Evidence]  # by dtype: the time of the fixed matmul
    notes: list[str]

    @property
    def moved(self) -> list[str]:
        """The dtypes whose fixed matmul took another time on the two sides: the machine itself changed."""
        return [dtype for dtype, evidence in self.controls.items() if evidence.verdict in CHANGED]

    @property
    def restless(self) -> list[str]:
        """The dtypes whose fixed matmul may have: its median is past the floor, and its bounds do not prove it."""
        limit = math.log1p(self.floor)
        return [d for d, evidence in self.controls.items() if abs(evidence.change) > limit and d not in self.moved]

    @property
    def suspects(self) -> set[Key]:
        """The cases that look slower, proven or not."""
        return {row.key for row in self.rows if row.evidence and row.evidence.change > math.log1p(self.floor)}

    def refined(self, more: Comparison) -> Comparison:
        """This, with the rows that a comparison of some of its cases over more pairs gave."""
        known = {row.key for row in more.rows}
        rows = [*more.rows, *(row for row in self.rows if row.key not in known)]
        rows.sort(key=lambda row: VERDICTS.index(row.verdict))
        notes = list(dict.fromkeys([*self.notes, *more.notes]))
        return replace(self, rows=rows, pairs=more.pairs, controls=self.controls | more.controls, notes=notes)

    def of(self, verdict: str) -> list[Row]:
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def code(self) -> int:
        """0, 1 where something regressed, 2 where something that should have been told could not be."""
        return 1 if self.of(REGRESSED) else 2 if any(row.cannot_say for row in self.rows) else 0


def compare(baselines: list[Run], candidates: list[Run], floor: float) -> Comparison:
    """Judge every case of n baseline runs and n candidate runs, taken in pairs. Raises ValueError across devices."""
    pairs = list(zip(baselines, candidates, strict=True))
    for run in (*baselines, *candidates):
        if difference := saved.incomparable(baselines[0], run):
            raise ValueError(difference)
    versions = next(filter(None, (saved.other_versions(a, b) for a, b in pairs)), "")
    controls = _controls(pairs, floor)
    yardsticks = _yardsticks(pairs, floor) if len(pairs) >= MIN_PAIRS and not versions else {}
    notes = [f"SDPA may differ ({versions}): judged by time, not against it"] if versions else []
    for group, evidence in yardsticks.items():
        notes.append(
            f"{group.workload} ({group.direction}): SDPA itself {percent(evidence.change)}: judged by time, not against it"
        )
    rows = []
    for key in dict.fromkeys(key for run in (*baselines, *candidates) for key in run.cases):
        trusted = not versions and Group(key.workload, key.direction) not in yardsticks
        rows.append(_row(key, pairs, trusted, controls, floor))
    rows.sort(key=lambda row: VERDICTS.index(row.verdict))
    return Comparison(rows, floor, len(pairs), controls, notes)


def _row(key: Key, pairs: list[tuple[Run, Run]], trusted: bool, controls: dict[str, Evidence], floor: float) -> Row:
    sides = [[run.cases[key] for run in side if key in run.cases] for side in zip(*pairs, strict=True)]
    if not sides[0]:
        return Row(key, NEW, seconds=(None, _median(sides[1])))
    if not sides[1]:
        return Row(key, REMOVED, seconds=(_median(sides[0]), None), reason="missing from the candidate")
    both = [(a.cases[key], b.cases[key]) for a, b in pairs if key in a.cases and key in b.cases]
    row = Row(key, INCONCLUSIVE, pairs=len(both), seconds=(_median(sides[0]), _median(sides[1])))
    if len(both) < len(pairs):
        return replace(row, reason=f"missing from {sum(len(pairs) - len(side) for side in sides)} of {2 * len(pairs)} runs")
    if key.form:
        different = next(filter(None, (saved.done_otherwise(a, b) for a, b in both)), "")
        return replace(row, reason=different) if different else _makespan(row, both, floor)
    paired = trusted and all(a.paired and b.paired for a, b in both)
    # a throttled baseline was throttled with its case, in the same rounds: their ratio still counts among several
    usable = both if paired and len(both) >= MIN_PAIRS else _steady(both)
    row = replace(row, basis="vs sdpa" if paired else "time", pairs=len(usable))
    if len(usable) < min(MIN_PAIRS, len(both)):
        return replace(row, reason=_throttled(both))
    evidence = judge([_ratio_log(a, b) if paired else _time_log(a, b) for a, b in usable], floor)
    control = controls.get(both[0][0].dtype)
    if not paired and control and control.verdict in CHANGED:
        return replace(row, evidence=evidence, reason=f"the machine moved: its control {percent(control.change)}")
    row = replace(row, verdict=evidence.verdict, evidence=evidence)
    if paired and len(both) < MIN_PAIRS and control and control.verdict == SAME and evidence.verdict in CHANGED:
        return _followed_by_time(row, judge([_time_log(a, b) for a, b in usable], floor))
    return row


def _followed_by_time(row: Row, time: Evidence) -> Row:
    """A change against SDPA on a machine that stood still is not the case's own where its time went the other way."""
    assert row.evidence
    if time.change * row.evidence.change >= 0:
        return row
    reason = f"its own time went the other way ({percent(time.change)}) on a machine that stood still: SDPA's moved"
    return replace(row, verdict=INCONCLUSIVE, reason=reason)


def _makespan(row: Row, both: Pairs, floor: float) -> Row:
    """Distributed cases. There is no control, so a change that one or two pairs show must also show in the speed-up."""
    usable = _steady(both)
    row = replace(row, basis="makespan", pairs=len(usable))
    if len(usable) < min(MIN_PAIRS, len(both)):
        return replace(row, reason=_throttled(both))
    evidence = judge([_time_log(a, b) for a, b in usable], floor)
    row = replace(row, verdict=evidence.verdict, evidence=evidence)
    if len(both) >= MIN_PAIRS or evidence.verdict == SAME or not all(a.paired and b.paired for a, b in usable):
        return row
    speedup = judge([_ratio_log(a, b) for a, b in usable], floor)
    if speedup.verdict == evidence.verdict:
        return row
    reason = f"the speed-up over one rank did not follow ({percent(-speedup.change)}): the kernel or the machine changed"
    return replace(row, verdict=INCONCLUSIVE, reason=reason)


def _controls(pairs: list[tuple[Run, Run]], floor: float) -> dict[str, Evidence]:
    """By dtype: what the fixed matmul's time did from baseline to candidate."""
    found = {}
    for dtype in sorted({case.dtype for case in pairs[0][0].cases.values()}):
        rates = [(a.control(dtype), b.control(dtype)) for a, b in pairs]
        logs = [math.log(one / other) for one, other in rates if one and other]
        if len(logs) == len(pairs):
            found[dtype] = judge(logs, floor)
    return found


def _yardsticks(pairs: list[tuple[Run, Run]], floor: float) -> dict[Group, Evidence]:
    """Where SDPA itself took another time on the two sides: what divides by it would hide that, or show it elsewhere."""
    logs: dict[Group, list[float]] = {}
    for a, b in pairs:
        groups: dict[Group, list[float]] = {}
        for key in a.cases.keys() & b.cases.keys():
            one, other = a.cases[key], b.cases[key]
            if key.form or not (key.implementation == "sdpa" or (one.paired and other.paired)):
                continue
            mine = groups.setdefault(Group(key.workload, key.direction), [])
            mine.append(_time_log(one, other) - (_ratio_log(one, other) if one.paired and other.paired else 0.0))
        for group, found in groups.items():
            logs.setdefault(group, []).append(statistics.median(found))
    judged = {group: judge(found, floor) for group, found in logs.items() if len(found) >= MIN_PAIRS}
    return {group: evidence for group, evidence in judged.items() if evidence.verdict in CHANGED}


def _time_log(one: Measured, other: Measured) -> float:
    return math.log(other.seconds / one.seconds)


def _ratio_log(one: Measured, other: Measured) -> float:
    """Slower is above 0, as with times."""
    assert one.paired
    assert other.paired
    return math.log(one.paired / other.paired)


def _median(cases: list[Measured]) -> float:
    return statistics.median(case.seconds for case in cases)


def _steady(both: Pairs) -> Pairs:
    return [(a, b) for a, b in both if not (a.throttled or b.throttled)]


def _throttled(both: Pairs) -> str:
    return f"throttled in {len(both) - len(_steady(both))} of {len(both)} pairs"


def percent(log: float) -> str:
    """A log ratio as the change in time that it means."""
    return f"{100 * math.expm1(log):+.1f} %"
