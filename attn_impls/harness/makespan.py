"""Timing that several ranks make together: a round takes as long as its slowest rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.collectives import all_gather, reduce_scatter
from ..parallel.plan import Traffic
from . import measure
from .calibration import Overhead
from .clock import Clock, CudaDriver, DeviceClock, HostClock, Sample, Subject, median_seconds
from .ranks import Ranks

PROBE_ROUNDS = 10


class Makespan:
    """The clocks' `agree`: a round's seconds are the slowest rank's, late where any is, and the spin as used as on any."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.by_rank: list[float] = []  # of the last round

    def __call__(self, seconds: float, late: bool, used: float) -> tuple[float, bool, float]:
        rounds = self.ranks.gather_round(seconds, late, used)
        self.by_rank = [one[0] for one in rounds]
        return max(self.by_rank), any(one[1] for one in rounds), max(one[2] for one in rounds)


def clock(ranks: Ranks, driver: CudaDriver | None, overhead: Callable[[], Overhead]) -> Clock:
    """The clock that all ranks advance together. On a GPU a collective of one element makes the devices start together."""
    if driver is None:
        return HostClock(agree=Makespan(ranks), align=ranks.align)
    one, found = torch.ones(1, device="cuda"), overhead()
    return DeviceClock(driver, found.seconds, found.empty_spin, Makespan(ranks), lambda: _all_reduce(one))


def _all_reduce(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)  # MAX, or the tensor would grow without end


@dataclass
class Track(Subject):
    """A subject with every rank's seconds of each sample."""

    by_rank: list[list[float]] = field(default_factory=list)
    retries: int = 0

    def timed(self, rounds: slice, retries: int) -> Track:
        return Track(self.call, self.loops, self.samples[rounds], self.by_rank[rounds], retries)

    @property
    def median(self) -> float:
        """Seconds: the median makespan."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def rank_medians(self) -> list[float]:
        return [statistics.median(one) for one in zip(*self.by_rank, strict=True)]

    @property
    def imbalance(self) -> float:
        """The median over rounds of the slowest rank's time over the ranks' mean."""
        return statistics.median(max(one) / statistics.fmean(one) for one in self.by_rank)


class Rounds:
    """Calls timed in the same rounds, the first of them as the benchmark: the others before it in even rounds, after in odd.

    What they put out is not looked at: ranks would have to agree on it after each round.
    """

    def __init__(self, ranks: Ranks, clock: Clock, calls: dict[str, Callable[[], Any]]):
        self.ranks, self.clock = ranks, clock
        self.tracks = {name: Track(call) for name, call in calls.items()}
        self.subject, *self.others = self.tracks.values()
        self.count = 0

    def run(self, benchmark: Any, rounds: int | None, warmup_rounds: int | None) -> dict[str, Track]:
        """Time all calls; rank 0 decides how often, where the caller does not."""
        self.clock.reset()
        planned, warmup = self.ranks.decided(measure.plan(self.clock, list(self.tracks.values()), self._sample))
        rounds = rounds or planned
        warmup = warmup if warmup_rounds is None else warmup_rounds
        done, retries = len(self.subject.samples), self.clock.retries
        timed = slice(done + warmup, done + warmup + rounds)
        try:
            benchmark.pedantic(
                partial(self._sample, self.subject),
                setup=self._before,
                teardown=self._after,
                rounds=rounds,
                warmup_rounds=warmup,
            )
        except BaseException:
            benchmark.has_error = True
            raise
        return {name: track.timed(timed, self.clock.retries - retries) for name, track in self.tracks.items()}

    def _sample(self, track: Track) -> Sample:
        sample = self.clock.sample(track)
        agree: Any = self.clock.agree
        track.by_rank.append(agree.by_rank)
        return sample

    def _measure_others(self) -> None:
        for track in self.others:
            self.clock.prepare(track)
            self._sample(track)

    def _before(self) -> None:
        if self.count % 2 == 0:
            self._measure_others()
        self.clock.prepare(self.subject)

    def _after(self) -> None:
        if self.count % 2:
            self._measure_others()
        self.count += 1


class Probe:
    """What this session's collectives reach, by kind and size; each measured once."""

    def __init__(self, ranks: Ranks, clock: Clock, device: str):
        self.ranks, self.clock, self.device = ranks, clock, device
        self.found: dict[tuple[str, int, int], float] = {}

    def together(self, traffic: Traffic) -> int:
        """How many ranks the collective is among."""
        return traffic.group.size() if traffic.group else self.ranks.size

    def seconds(self, traffic: Traffic) -> float:
        """The median time of the bare collective. All ranks call it together."""
        key = traffic.collective, traffic.bytes, self.together(traffic)
        if key not in self.found:
            self.clock.reset()
            self.found[key] = median_seconds(self.clock, self._call(traffic), PROBE_ROUNDS)
        return self.found[key]

    def bus_bytes_per_s(self, traffic: Traffic) -> float:
        """Bus bandwidth as nccl-tests define it: comparable between collectives and numbers of ranks."""
        n = self.together(traffic)
        factor = {"all_gather": n - 1, "all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n}[traffic.collective]
        return factor * traffic.bytes / self.seconds(traffic)

    def _call(self, traffic: Traffic) -> Callable[[], Any]:
        def bf16(size: int) -> torch.Tensor:
            return torch.zeros(size // 2, dtype=torch.bfloat16, device=self.device)

        whole, n, group = bf16(traffic.bytes), self.together(traffic), traffic.group
        if traffic.collective == "all_gather":
            into = bf16(traffic.bytes * n)
            return lambda: all_gather(into, whole, group).wait()
        if traffic.collective == "reduce_scatter":
            part = bf16(traffic.bytes // n)
            return lambda: reduce_scatter(part, whole, group)
        return lambda: dist.all_reduce(whole, group=group)
