"""Saved runs (pytest-benchmark JSON) reduced to what a comparison needs of each case."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import environment

# what decides how fast the baseline SDPA is, besides the device
SDPA_VERSIONS = ("torch", "cuda", "cudnn", "driver")


# the options that decide what a distributed case does; of those that its form has
HOW = ("overlap_chunks", "overlap_along", "overlap_streams", "pad_heads")


class Key(NamedTuple):
    """Which case it is."""

    workload: str
    implementation: str
    direction: str = "forward"
    strategy: str = ""  # the last three: of distributed cases
    form: str = ""
    world_size: int = 1

    def __str__(self) -> str:
        place = f" {self.form} on {self.world_size} ranks" if self.form else ""
        return f"{self.implementation}{place}" + ("" if self.direction == "forward" else f" ({self.direction})")


@dataclass(frozen=True)
class Measured:
    """One case of one run."""

    key: Key
    fullname: str
    seconds: float  # the median round; of distributed cases the median makespan
    paired: float | None  # vs_sdpa, or the speed-up over one rank: measured in the same rounds, higher is faster
    dtype: str
    control: float | None  # TFLOP/s that the session's fixed matmul reached
    throttled: bool
    how: dict[str, Any] = field(default_factory=dict)  # of distributed cases: the options among HOW that were recorded


@dataclass(frozen=True)
class Run:
    path: str
    machine: dict[str, Any]
    cases: dict[Key, Measured]
    commit: str
    datetime: str

    def only(self, keys: Collection[Key]) -> Run:
        return replace(self, cases={key: case for key, case in self.cases.items() if key in keys})

    def control(self, dtype: str) -> float | None:
        """What the fixed matmul reached in this run; one value a session and dtype."""
        found = [case.control for case in self.cases.values() if case.dtype == dtype and case.control]
        return statistics.median(found) if found else None


def read(path: str | Path) -> Run:
    """Raises ValueError with one line where the file is not a run of this suite."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        machine, commit = document["machine_info"], document.get("commit_info") or {}
        ours = [benchmark for benchmark in document["benchmarks"] if "workload" in benchmark["extra_info"]]
        cases = {case.key: case for case in map(_measured, ours)}
        environment.same_device(machine, machine)  # or it has none
        run = Run(str(path), machine, cases, str(commit.get("id", ""))[:12], str(document.get("datetime", "")))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} is not a JSON file of pytest-benchmark") from None
    if not run.cases:
        raise ValueError(f"{str(path)!r} holds no result of this suite")
    return run


def _measured(benchmark: dict[str, Any]) -> Measured:
    info = benchmark["extra_info"]
    form = info.get("form", "")
    place = (info["strategy"], form, info["world_size"]) if form else ()
    key = Key(info["workload"], info["implementation"], info.get("direction", "forward"), *place)
    itself = key.implementation == "sdpa" and not form
    paired = info.get("speedup") if form else None if itself else info.get("vs_sdpa")
    seconds = benchmark["stats"]["median"]
    if not all(0 < number < math.inf for number in (seconds, paired or 1.0)):
        raise TypeError("a time is no time")
    control, throttled = info.get("ceiling_tflops"), bool(info.get("sm_clock_unsteady"))
    how = {name: info[name] for name in HOW if name in info}
    return Measured(key, benchmark["fullname"], seconds, paired or None, info.get("dtype", ""), control or None, throttled, how)


def done_otherwise(one: Measured, other: Measured) -> str:
    """The option with which two runs of a distributed case were made differently, or ""; older files do not say."""
    for name in one.how.keys() & other.how.keys():
        if one.how[name] != other.how[name]:
            return f"made with {name} {one.how[name]}, now {other.how[name]}"
    return ""


def incomparable(one: Run, other: Run) -> str:
    """Why no number of two runs can be compared, or ""."""
    if difference := environment.same_device(one.machine, other.machine):
        said = difference.replace("this run", one.path).replace("that one", other.path)
        return f"two devices: {said}; compare runs of one device only"
    threads = [run.machine.get("threads") for run in (one, other)]
    if threads[0] != threads[1]:
        return f"{one.path} and {other.path} ran with {threads[0]} and {threads[1]} torch threads"
    return ""


def other_versions(one: Run, other: Run) -> str:
    """What differs between two runs that SDPA's own speed depends on, or ""."""
    found = [(name, one.machine.get(name), other.machine.get(name)) for name in SDPA_VERSIONS]
    return ", ".join(f"{name} {old} → {new}" for name, old, new in found if old != new)
