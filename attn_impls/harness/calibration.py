"""What the device clock itself takes: measured at a session's beginning, by spin kernels and CUPTI."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from .clock import FIRST_CYCLES, DeviceClock, Driver, Subject, median_seconds


class Overhead(NamedTuple):
    """What the two events of a bracket add to the kernel between them, and what they read beside the cycles of a spin."""

    seconds: float
    empty_spin: float
    source: str


def _empty_spin(clock: DeviceClock) -> float:
    """What a bracket around a spin reads beside the spin's cycles: some 1 µs more than one around an empty spin reads.

    By long spins, each between two short ones: the card's clock may rise or fall meanwhile, and spins of one length after
    those of another would take that for time beside the cycles.
    """
    short, long = (Subject(partial(clock.driver.spin, n * FIRST_CYCLES)) for n in (1, 4))
    for subject in [short, long] * 30 + [short]:
        clock.prepare(subject)
        clock.sample(subject)
    around = [(one.seconds + other.seconds) / 2 for one, other in pairwise(short.samples[5:])]
    four = [sample.seconds for sample in long.samples[5:]]
    return statistics.median(one - (longer - one) / 3 for one, longer in zip(around, four, strict=True))


def calibrate(driver: Driver, spin_seconds: Callable[[], float | None]) -> Overhead:
    """The bracket's own time: around an empty spin, minus that kernel's duration as the profiler gives it."""
    clock = DeviceClock(driver)
    bracket = median_seconds(clock, lambda: driver.spin(0), rounds=50, warmup=10)
    beside = _empty_spin(clock)
    kernel = spin_seconds()
    if kernel is None:
        empty = median_seconds(clock, lambda: None, rounds=50)
        return Overhead(empty, beside, "empty bracket: the profiler gave no kernel times")
    return Overhead(max(0.0, bracket - kernel), beside, "bracket around an empty spin, minus that kernel in CUPTI")
