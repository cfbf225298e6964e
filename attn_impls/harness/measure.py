"""Timing one case through benchmark.pedantic: rounds paired with SDPA, and everything that is recorded beside the time."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .clock import CPU_ROUND_SECONDS, Clock, DeviceClock, HostClock, Sample, Subject, make_ready

ROUND_BUDGET_SECONDS = {"device": 2.0, "host": 0.3}  # for the rounds of a case
MAX_ROUNDS = 100
MIN_ROUNDS = {"device": 20, "host": 7}  # a CPU without the dtype's instructions takes seconds a round; 6 make an interval
# a GPU's case has more rounds than are enough only where all fit in QUICK_SECONDS; fewer are enough of a short call
ENOUGH_ROUNDS, ENOUGH_SHORT, SHORT_SECONDS, QUICK_SECONDS = 50, 25, 1e-3, 0.12
WARMUP_SECONDS = {"device": 0.2, "host": 0.1}
MIN_WARMUP, MAX_WARMUP = 3, 5  # the judge has called it before
ENQUEUE_SECONDS = 0.2  # for the pass that times enqueues alone
ENQUEUE_CYCLES, ENQUEUE_BATCH_SECONDS = 8_000_000, 2e-3  # a spin of about 4 ms, and what the host may take of it for a batch
THROTTLED = 0.95  # p5 of the SM clock below this share of its median


S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Timing:
    """The samples of one case, and of the SDPA baseline measured in the same rounds (None where there is none)."""

    samples: list[Sample]
    baseline: list[Sample] | None
    retries: int

    @property
    def median(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)


def run(
    benchmark: Any,
    clock: Clock,
    call: Callable[[], Any],
    baseline: Callable[[], Any] | None,
    rounds: int | None = None,
    warmup_rounds: int | None = None,
    seen: Callable[[Any], None] | None = None,
    turn: Callable[[], None] | None = None,
) -> Timing:
    """Time `call` in benchmark's rounds, alternating with the baseline: first in even rounds, last in odd ones.

    seen: called with the output of each round of `call`, those that warm up included, and after those that plan.
    turn: called before each of these rounds; may change what `call` works on.
    """
    clock.reset()
    subject, other = Subject(call), Subject(baseline) if baseline else None
    planned, warmup = plan(clock, [s for s in (subject, other) if s], clock.sample)
    subject.seen = seen  # not while planning, which would count what it takes
    rounds = rounds or planned
    warmup = warmup if warmup_rounds is None else warmup_rounds
    timed = slice(len(subject.samples) + warmup, len(subject.samples) + warmup + rounds)  # --benchmark-cprofile adds more
    before, after = _around(clock, subject, other, turn)
    retries = clock.retries
    try:
        benchmark.pedantic(partial(clock.sample, subject), setup=before, teardown=after, rounds=rounds, warmup_rounds=warmup)
    except BaseException:  # pytest-benchmark would save the rounds before a Ctrl-C as if they were all
        benchmark.has_error = True
        raise
    return Timing(subject.samples[timed], other.samples[timed] if other else None, clock.retries - retries)


def _around(
    clock: Clock, subject: Subject, other: Subject | None, turn: Callable[[], None] | None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What comes before each round, and after: the baseline's, in turn, and what makes ready for it."""
    count = 0

    def measure_baseline() -> None:
        if other:
            clock.prepare(other)
            clock.sample(other)

    def before() -> None:
        if turn:
            turn()
        if count % 2 == 0:
            measure_baseline()
        clock.prepare(subject)

    def after() -> None:
        nonlocal count
        if count % 2:
            measure_baseline()
        count += 1

    return before, after


def plan(clock: Clock, subjects: Sequence[S], sample: Callable[[S], Sample]) -> tuple[int, int]:
    """Rounds and warm-up rounds for the time there is, after setting how often a CPU round loops its call.

    subjects: what each round times; sample: times one of them.
    """
    for _ in range(2):
        started, longest = time.perf_counter(), 0.0
        for s in subjects:
            clock.prepare(s)
            seconds = sample(s).seconds
            longest = max(longest, seconds)
            if clock.timer == "host":
                s.loops = max(1, math.ceil(CPU_ROUND_SECONDS / max(seconds, 1e-9)))
        a_round = time.perf_counter() - started
    a_round = max(a_round, CPU_ROUND_SECONDS * len(subjects)) if clock.timer == "host" else a_round
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS[clock.timer], int(ROUND_BUDGET_SECONDS[clock.timer] / a_round)))
    warmup = max(MIN_WARMUP, math.ceil(WARMUP_SECONDS[clock.timer] / a_round))
    if clock.timer == "host":
        return rounds, warmup
    enough = ENOUGH_SHORT if longest < SHORT_SECONDS else ENOUGH_ROUNDS
    return min(rounds, max(enough, int(QUICK_SECONDS / a_round))), min(warmup, MAX_WARMUP)


def paired_ratio(timing: Timing) -> tuple[float, float, float] | None:
    """t_baseline / t_case: the median of the rounds' ratios, and its 95 % interval from the ratios' order statistics.

    None without a baseline, and where its rounds measured the host.
    """
    if not timing.baseline or host_bound(timing.baseline):
        return None
    pairs = zip(timing.baseline, timing.samples, strict=True)
    ratios = sorted(base.seconds / sample.seconds for base, sample in pairs if sample.seconds > 0)
    n = len(ratios)
    if n < 6:  # no two order statistics of fewer enclose the median in 95 % of cases
        return None
    low = max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2) - 1)
    return statistics.median(ratios), ratios[low], ratios[n - 1 - low]


def host_bound(samples: list[Sample]) -> bool:
    """Whether most rounds found the device idle: these times are the host's."""
    return sum(sample.late for sample in samples) > len(samples) / 2


def facts(timing: Timing, clock: Clock) -> dict[str, Any]:
    """The flat extra_info that the samples themselves give."""
    samples = timing.samples
    mhz = sorted(sample.sm_mhz for sample in samples if not math.isnan(sample.sm_mhz)) or [math.nan]
    clocked = not math.isnan(mhz[0])
    median_mhz, p5_mhz = statistics.median(mhz), mhz[len(mhz) // 20]
    ratio = paired_ratio(timing)
    return {
        "timer": clock.timer,
        "overhead_us": clock.overhead * 1e6,
        "raw_median_us": (timing.median + clock.overhead) * 1e6,
        "host_bound": host_bound(samples),
        "late_rounds": sum(sample.late for sample in samples),
        "late_baseline_rounds": sum(sample.late for sample in timing.baseline or []),
        "sdpa_s": statistics.median(sample.seconds for sample in timing.baseline or []) if ratio else None,
        "remeasured_rounds": timing.retries,
        "cold_l2": clock.cold_l2,
        "sm_mhz_median": median_mhz if clocked else None,
        "sm_mhz_p5": p5_mhz if clocked else None,
        "sm_clock_unsteady": clocked and p5_mhz < THROTTLED * median_mhz,
        "vs_sdpa": ratio and ratio[0],
        "vs_sdpa_ci_low": ratio and ratio[1],
        "vs_sdpa_ci_high": ratio and ratio[2],
    }


def cost(call: Callable[[], Any], clock: Clock, seconds: float) -> dict[str, Any]:
    """What a call of known time costs besides it: host_us and peak_bytes; on a CPU, the call itself and None."""
    if isinstance(clock, HostClock):
        return {"host_us": seconds * 1e6, "peak_bytes": None}
    return {"host_us": enqueue_seconds(call, clock, seconds) * 1e6, "peak_bytes": peak_bytes(call)}


def enqueue_seconds(call: Callable[[], Any], clock: DeviceClock, seconds: float) -> float:
    """What one call costs the CPU: the lower quartile (interruptions only add) of calls enqueued behind a busy device.

    Apart from the timed rounds, where each call follows a synchronisation and finds the CPU's caches cold.
    """
    calls = round(min(25, max(5, ENQUEUE_SECONDS / max(seconds, 1e-6))))
    times: list[float] = []
    while len(times) < calls:
        fit = int(ENQUEUE_BATCH_SECONDS / max(*times[-10:], 1e-6)) if times else 1
        most = 1 if hasattr(call, "ready") else 10  # ten forward passes kept for their gradients may not fit
        batch = max(1, min(fit, most, calls - len(times)))
        make_ready(call, batch)
        clock.quiet()
        clock.driver.spin(ENQUEUE_CYCLES)
        for _ in range(batch):
            started = clock.driver.host_time()
            call()
            times.append(clock.driver.host_time() - started)
    return sorted(times)[len(times) // 4]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most device memory one call holds beyond its inputs, the output included."""
    make_ready(call)
    torch.cuda.synchronize()
    collecting = gc.isenabled()
    gc.disable()  # garbage freed during the call would hide what the call takes
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    finally:
        if collecting:
            gc.enable()
