"""Clocks for pytest-benchmark that only the measured kernel advances: device time on a GPU, wall time on a CPU.

The device clock brackets one launch with two events while a spin kernel keeps the GPU busy, so that the host's enqueue
time hides behind the spin; `start.query()` proves that it did. See "What a number means" in README.md.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

LEAD_CYCLES = 120_000  # at least: keeps the GPU busy while the host enqueues the event before the measured spin, and that spin
FIRST_CYCLES = 200_000  # about 0.1 ms
MAX_CYCLES = 32_000_000  # about 16 ms: past this, the call waits for the device itself
TIGHT = 0.5  # of a spin is what the host may use in a usual round
# A spin fits all but the longest of the recent rounds, fewer than a fifth of them: in those the host stalled, and those of
# them that were late are measured again, which costs less than long spins for all.
RECENT, USUAL = 15, 0.8
# Behind a flushed L2, one kernel launch in four of a process begins 0.9 µs later (H100s, torch 2.11). A round of a multiple of
# four launches would meet that always or never. Fewer than this many before it, in turn, spread it over 20 rounds or more: so
# it does not reach the median of a call of one launch. Half the rounds of a call of two have it. (Not with 7 subjects in turn.)
EMPTY_LAUNCHES = 7
CPU_ROUND_SECONDS = 1e-3


class Sample(NamedTuple):
    seconds: float  # of one call, the bracket's overhead taken off
    host_seconds: float  # what one enqueue costs the CPU
    sm_mhz: float  # SM clock during the spin before the call; nan on a CPU, and where the host stalled before the spin
    late: bool  # the device was idle before the call was enqueued: this measured the host


def make_ready(call: Callable[[], Any], calls: int = 1) -> None:
    """Do what a call needs done before it, untimed: its `ready(calls)`, where it has one (a backward pass needs a forward)."""
    ready = getattr(call, "ready", None)
    if ready:
        ready(calls)


@dataclass
class Subject:
    """Something to time: a call without arguments, how often to loop it a round, and the samples so far.

    seen: called with the output of each sample's (last) call, after its time was taken.
    """

    call: Callable[[], Any]
    loops: int = 1
    samples: list[Sample] = field(default_factory=list)
    seen: Callable[[Any], None] | None = field(default=None, kw_only=True)


class Event(Protocol):
    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Driver(Protocol):
    """What the device clock needs of a device; a fake one stands in for a GPU in tests."""

    def flush(self) -> object: ...
    def spin(self, cycles: int, /) -> None: ...
    def synchronize(self) -> None: ...
    def event(self) -> Event: ...
    def host_time(self) -> float: ...


class CudaDriver:
    """The current CUDA device. Holds a buffer of twice its L2, overwritten to make the L2 cold."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(2 * l2, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self.buffer.zero_()

    def spin(self, cycles: int, /) -> None:
        # private, but the only kernel in torch that busy-waits for a number of SM cycles (torch's own tests use it)
        torch.cuda._sleep(cycles)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def host_time(self) -> float:
        return time.perf_counter()

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


def alone(seconds: float, late: bool, used: float) -> tuple[float, bool, float]:
    """What one process decides about its round; ranks that time together pass a function that takes the maximum.

    used: the share of the spin that the host has used.
    """
    return seconds, late, used


class Fitted:
    """A spin's cycles, by what the host has needed of late behind it."""

    def __init__(self, least: int):
        self.least = self.cycles = least
        self._needed: deque[float] = deque(maxlen=RECENT)

    def fit(self, needed: float) -> None:
        self._needed.append(needed)
        usual = sorted(self._needed)[int(USUAL * len(self._needed))]
        self.cycles = round(min(max(self.least, usual / TIGHT), MAX_CYCLES))

    def reset(self) -> None:
        self.cycles = self.least
        self._needed.clear()


class DeviceClock:
    """A timer in seconds that `sample` advances by device time alone."""

    cold_l2 = True
    timer = "device"

    def __init__(
        self,
        driver: Driver,
        overhead: float = 0.0,
        empty_spin: float = 0.0,
        agree: Callable[[float, bool, float], tuple[float, bool, float]] = alone,
        align: Callable[[], None] | None = None,
    ):
        """overhead: what a bracket adds to its kernel; empty_spin: what a bracket reads beside a spin's cycles.

        align: enqueues, behind the spin, what makes the devices of several ranks start together.
        """
        self.driver, self.overhead, self.empty_spin = driver, overhead, empty_spin
        self.agree, self.align = agree, align
        self.now = 0.0
        self.lead, self.spin = Fitted(LEAD_CYCLES), Fitted(FIRST_CYCLES)
        self.retries = 0
        self._prepared = 0
        self._spun_at = 0.0
        self._cycle = 1 / 2e9  # seconds, by the last spin that was measured
        self._gapless = True  # the spin was there before its lead ended, so that the event between them is its beginning
        self._before, self._start, self._stop = driver.event(), driver.event(), driver.event()
        self._spun = driver.event() if align else self._start  # the spin's end

    def __call__(self) -> float:
        return self.now

    def reset(self) -> None:
        """Start another case: with the short spin again, whatever the last one needed."""
        self.spin.reset()

    def quiet(self) -> None:
        """Make the L2 cold and wait for the device."""
        self.driver.flush()
        self.driver.synchronize()

    def prepare(self, subject: Subject) -> None:
        """Make the call ready and the device quiet, then let it spin while the caller enqueues."""
        make_ready(subject.call)
        self.quiet()
        for _ in range(self._prepared % EMPTY_LAUNCHES):
            self.driver.spin(0)
        self._prepared += 1
        began = self.driver.host_time()
        self.driver.spin(self.lead.cycles)
        self._before.record()
        self.driver.spin(self.spin.cycles)
        self._spun_at = self.driver.host_time()
        needed = (self._spun_at - began) / self._cycle
        self._gapless = needed < self.lead.cycles
        self.lead.fit(needed)
        if self.align:
            self._spun.record()
            self.align()

    def sample(self, subject: Subject) -> Sample:
        """Time one call; `prepare` comes right before. A late round is measured again behind a longer spin."""
        while True:
            spun = self.spin.cycles
            self._start.record()
            enqueued = self.driver.host_time()
            out = subject.call()
            host = self.driver.host_time() - enqueued
            self._stop.record()
            late = self._start.query()
            used = self.driver.host_time() - self._spun_at
            self._stop.synchronize()
            if self._gapless:
                self._cycle = (self._before.elapsed_time(self._spun) * 1e-3 - self.empty_spin) / spun
            elapsed = self._start.elapsed_time(self._stop) * 1e-3 - self.overhead
            seconds, late, share = self.agree(elapsed, late, used / (spun * self._cycle))
            self.spin.fit(share * spun)
            if not late or spun >= MAX_CYCLES:
                break
            self.retries += 1
            del out  # or the next call's would stand beside it
            self.prepare(subject)
        sample = Sample(seconds, host, 1e-6 / self._cycle if self._gapless else float("nan"), late)
        subject.samples.append(sample)
        self.now += seconds
        if subject.seen:
            subject.seen(out)
        return sample


class HostClock:
    """A timer in seconds for kernels that run on the CPU: wall time of a loop, divided by its length."""

    cold_l2 = False
    timer = "host"
    overhead = 0.0
    retries = 0

    def __init__(
        self,
        host_time: Callable[[], float] = time.perf_counter,
        agree: Callable[[float, bool, float], tuple[float, bool, float]] = alone,
        align: Callable[[], None] | None = None,
    ):
        """agree, align: as of DeviceClock; `align` returns when all ranks are there."""
        self.now = 0.0
        self.host_time, self.agree, self.align = host_time, agree, align

    def __call__(self) -> float:
        return self.now

    def reset(self) -> None:
        pass

    def prepare(self, subject: Subject) -> None:
        make_ready(subject.call, subject.loops)
        if self.align:
            self.align()

    def sample(self, subject: Subject) -> Sample:
        """Time `subject.loops` calls; the clock advances by one call's share."""
        discarded, call = range(subject.loops - 1), subject.call
        start = self.host_time()
        for _ in discarded:
            call()
        out = call()  # alone: an output that lives on while the next is made would give that one other memory
        host = (self.host_time() - start) / subject.loops
        seconds, _, _ = self.agree(host, False, 0.0)
        sample = Sample(seconds, host, float("nan"), False)
        subject.samples.append(sample)
        self.now += seconds
        if subject.seen:
            subject.seen(out)
        return sample


Clock = DeviceClock | HostClock


def median_seconds(clock: Clock, call: Callable[[], Any], rounds: int, warmup: int = 3) -> float:
    """Median time of a call, for calibration and ceilings."""
    subject = Subject(call)
    for _ in range(warmup + rounds):
        clock.prepare(subject)
        clock.sample(subject)
    return statistics.median(sample.seconds for sample in subject.samples[warmup:])
