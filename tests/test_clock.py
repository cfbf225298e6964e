"""The clocks on a fake timeline, where the truth about every second is known."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from attn_impls.harness import clock as clocks
from attn_impls.harness import measure
from attn_impls.harness.clock import (
    FIRST_CYCLES,
    LEAD_CYCLES,
    MAX_CYCLES,
    RECENT,
    DeviceClock,
    HostClock,
    Subject,
    calibrate,
)

MHZ = 1500.0
FIRST_SPIN = FIRST_CYCLES / MHZ / 1e6  # seconds
ATTEMPTS_TO_CAP = 4  # 200, 800, 3200 and 8000 thousand cycles
KERNEL = 20e-6


class FakeEvent:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.at = self.gpu.enqueue(self.gpu.event_seconds)
        self.gpu.log.append("record")

    def query(self):
        return self.gpu.host >= self.at

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGpu:
    """A host and a device with one in-order queue. Everything the host enqueues costs it `launch` seconds."""

    def __init__(self, mhz=MHZ, launch=2e-6, event_seconds=0.0, empty_spin=0.0):
        self.mhz, self.launch, self.event_seconds, self.empty_spin = mhz, launch, event_seconds, empty_spin
        self.host = self.drained = 0.0  # now on the host; when the device's queue is empty
        self.log = []

    def enqueue(self, seconds):
        """Kernel of some device seconds; returns when it ends."""
        self.host += self.launch
        self.drained = max(self.drained, self.host) + seconds
        return self.drained

    def work(self, seconds):
        self.host += seconds

    def flush(self):
        self.log.append("flush")
        self.enqueue(30e-6)

    def spin(self, cycles, /):
        self.log.append(("spin", cycles))
        self.enqueue(self.empty_spin + cycles / self.mhz / 1e6)

    @property
    def spins(self):
        """The cycles of each spin that a call was enqueued behind."""
        return [entry[1] for entry in self.log if entry[0] == "spin" and entry[1] != LEAD_CYCLES]

    def synchronize(self):
        self.host = max(self.host, self.drained)

    def event(self):
        return FakeEvent(self)

    def host_time(self):
        return self.host

    def call(self, *parts):
        """A call of kernels (positive seconds) and of host work (negative ones), in order."""

        def run():
            for seconds in parts:
                self.enqueue(seconds) if seconds > 0 else self.work(-seconds)

        return run

    def item(self):
        """A call that waits for its own result."""
        self.enqueue(KERNEL)
        self.synchronize()
        self.work(1e-6)


def sample(clock, call):
    subject = Subject(call)
    clock.prepare(subject)
    return clock.sample(subject)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("order", ["work first", "work between", "work last"])
def test_device_time_is_exact_whatever_the_host_costs_behind_the_spin(share, order):
    gpu = FakeGpu()
    work = -share * FIRST_SPIN
    parts = {"work first": (work, 5e-6, 9e-6), "work between": (5e-6, work, 9e-6), "work last": (5e-6, 9e-6, work)}[order]
    clock = DeviceClock(gpu)
    found = sample(clock, gpu.call(*parts))
    assert found.seconds == pytest.approx(14e-6, rel=1e-9)
    assert found.host_seconds == pytest.approx(-work + 2 * gpu.launch, rel=1e-9)
    assert (found.late, clock.retries) == (False, 0)


@pytest.mark.parametrize(("spins", "longer"), [(1.7, 4), (1.9, 4), (2.4, 8), (7.5, 16), (39.0, MAX_CYCLES / FIRST_CYCLES)])
def test_a_host_slower_than_the_spin_is_timed_again_behind_one_of_twice_its_time(spins, longer):
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    found = sample(clock, gpu.call(-spins * FIRST_SPIN, KERNEL))
    assert clock.retries == 1
    assert gpu.spins == [FIRST_CYCLES, longer * FIRST_CYCLES]
    assert found.seconds == pytest.approx(KERNEL, rel=1e-9)
    assert not found.late


@pytest.mark.parametrize("late_too", [False, True])
def test_a_host_that_uses_most_of_a_spin_gets_a_longer_one_without_a_retry(late_too):
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    call = gpu.call(-(1.7 if late_too else 0.8) * FIRST_SPIN, KERNEL)
    for _ in range(4):
        assert sample(clock, call).seconds == pytest.approx(KERNEL, rel=1e-9)
    assert clock.retries == late_too
    assert gpu.spins == [FIRST_CYCLES * n for n in ((1, 4, 4, 4, 4) if late_too else (1, 2, 2, 2))]


def test_stalls_of_the_host_are_timed_again_without_a_longer_spin():
    gpu = FakeGpu()
    clock, prompt, stalled = DeviceClock(gpu), gpu.call(KERNEL), iter([3.0, 0.0, 30.0])

    def now_and_then():
        gpu.work(next(stalled, 0.0) * FIRST_SPIN)
        prompt()

    for _ in range(RECENT):
        sample(clock, prompt)
    assert [sample(clock, now_and_then).seconds for _ in range(9)] == pytest.approx([KERNEL] * 9, rel=1e-9)
    assert clock.retries == 2
    assert set(gpu.spins) == {FIRST_CYCLES}


def test_a_host_that_stays_slow_gets_a_longer_spin_and_a_prompt_one_the_short_spin_again():
    gpu = FakeGpu()
    clock, prompt, slow = DeviceClock(gpu), gpu.call(KERNEL), gpu.call(-3 * FIRST_SPIN, KERNEL)
    for _ in range(RECENT):
        sample(clock, prompt)
    assert not sample(clock, slow).late
    assert clock.cycles == 8 * FIRST_CYCLES
    assert clock.retries == RECENT // 5
    for _ in range(RECENT):
        sample(clock, prompt)
    assert clock.cycles == FIRST_CYCLES


def test_two_subjects_in_turn_get_the_spin_that_the_slower_one_needs():
    gpu = FakeGpu()
    clock, prompt, slow = DeviceClock(gpu), gpu.call(KERNEL), gpu.call(-1.7 * FIRST_SPIN, KERNEL)
    for _ in range(2 * RECENT):
        sample(clock, slow)
        sample(clock, prompt)
    assert clock.retries == 1
    assert set(gpu.spins[1:]) == {4 * FIRST_CYCLES}


def test_spins_do_not_grow_past_the_cap():
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    for _ in range(3):
        sample(clock, gpu.call(-0.9 * MAX_CYCLES / MHZ / 1e6, KERNEL))
    assert clock.cycles == max(gpu.spins) == MAX_CYCLES


def test_a_host_that_stalls_before_the_call_is_timed_again():
    gpu = FakeGpu()
    clock, subject = DeviceClock(gpu), Subject(gpu.call(KERNEL))
    clock.prepare(subject)
    gpu.work(2 * FIRST_SPIN)
    found = clock.sample(subject)
    assert clock.retries == 1
    assert found.seconds == pytest.approx(KERNEL, rel=1e-9)
    assert found.sm_mhz == pytest.approx(MHZ, rel=1e-9)


def test_retries_leave_one_sample_and_are_flushed_like_first_tries():
    gpu = FakeGpu()
    clock, subject = DeviceClock(gpu), Subject(gpu.call(-3 * FIRST_SPIN, KERNEL))
    clock.prepare(subject)
    found = clock.sample(subject)
    assert subject.samples == [found]
    assert clock.now == found.seconds
    spin, tries = ("spin", LEAD_CYCLES), [FIRST_CYCLES, 8 * FIRST_CYCLES]
    assert gpu.log == [e for cycles in tries for e in ("flush", spin, "record", ("spin", cycles), "record", "record")]


def test_a_spin_once_lengthened_is_not_learnt_again():
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    call = gpu.call(-3 * FIRST_SPIN, KERNEL)
    sample(clock, call)
    assert clock.retries == 1
    assert sample(clock, call).seconds == pytest.approx(KERNEL, rel=1e-9)
    assert clock.retries == 1


def test_a_call_that_waits_for_the_device_ends_late_at_the_cap_and_is_host_bound():
    gpu = FakeGpu()
    clock, subject = DeviceClock(gpu), Subject(gpu.item)
    clock.prepare(subject)
    assert clock.sample(subject).late
    assert (clock.cycles, clock.retries) == (MAX_CYCLES, ATTEMPTS_TO_CAP - 1)
    for _ in range(9):
        clock.prepare(subject)
        clock.sample(subject)
    assert clock.retries == ATTEMPTS_TO_CAP - 1  # at the cap, one try each
    assert gpu.log.count("flush") == ATTEMPTS_TO_CAP + 9
    facts = measure.facts(measure.Timing(subject.samples, None, clock.retries), clock)
    assert facts["host_bound"]
    assert facts["late_rounds"] == 10
    assert facts["remeasured_rounds"] == ATTEMPTS_TO_CAP - 1


@pytest.mark.parametrize("overhead", [0.0, 2.2e-6, 3.8e-6])
def test_the_overhead_of_the_events_is_subtracted(overhead):
    gpu = FakeGpu(event_seconds=overhead)
    clock = DeviceClock(gpu, overhead)
    assert sample(clock, gpu.call(KERNEL)).seconds == pytest.approx(KERNEL, rel=1e-9)
    assert clock.now == pytest.approx(KERNEL, rel=1e-9)


@pytest.mark.parametrize("host", [0.0, 3e-3], ids=["prompt", "slow"])
@pytest.mark.parametrize("mhz", [345.0, 1410.0, 1980.0])
@pytest.mark.parametrize(("event", "empty"), [(0.0, 0.0), (2.2e-6, 0.0), (2.2e-6, 1.3e-6)])
def test_the_sm_clock_is_recovered_exactly(mhz, host, event, empty):
    gpu = FakeGpu(mhz, event_seconds=event, empty_spin=empty)
    found = calibrate(gpu, lambda: empty)
    clock = DeviceClock(gpu, found.seconds, found.empty_spin)
    assert sample(clock, gpu.call(-host, KERNEL)).sm_mhz == pytest.approx(mhz, rel=1e-6)
    assert clock.retries > 0 if host else clock.retries == 0


def test_a_stall_before_the_spin_leaves_no_reading_of_the_sm_clock():
    gpu = FakeGpu()
    clock, spin = DeviceClock(gpu), gpu.spin
    assert sample(clock, gpu.call(KERNEL)).sm_mhz == pytest.approx(MHZ, rel=1e-9)

    def late_spin(cycles):
        gpu.work(1e-3 if cycles == FIRST_CYCLES else 0.0)
        spin(cycles)

    gpu.spin = late_spin
    found = sample(clock, gpu.call(KERNEL))
    assert found.sm_mhz != found.sm_mhz
    assert found.seconds == pytest.approx(KERNEL, rel=1e-9)
    assert (found.late, clock.retries, clock.cycles) == (False, 0, FIRST_CYCLES)


def test_the_cache_is_cold_and_the_device_idle_before_every_spin():
    gpu = FakeGpu()
    DeviceClock(gpu).prepare(Subject(gpu.call(KERNEL)))
    idle = 30e-6 + gpu.launch  # the flush, waited for
    spins = (LEAD_CYCLES + FIRST_CYCLES) / MHZ / 1e6
    assert gpu.log == ["flush", ("spin", LEAD_CYCLES), "record", ("spin", FIRST_CYCLES)]
    assert gpu.drained == pytest.approx(idle + gpu.launch + spins, rel=1e-9)
    assert gpu.host == pytest.approx(idle + 3 * gpu.launch, rel=1e-9)  # it does not wait for the spin


def test_only_samples_advance_the_clock():
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    readings = [clock()]
    for step in (gpu.call(1e-3, -1e-3), gpu.flush, lambda: clock.prepare(Subject(gpu.flush))):
        step()
        readings.append(clock())
    assert readings == [0.0] * 4
    total = clock.sample(Subject(gpu.call(KERNEL))).seconds + sample(clock, gpu.call(2 * KERNEL)).seconds
    assert clock() == pytest.approx(total, rel=1e-12)
    assert total == pytest.approx(3 * KERNEL, rel=1e-9)


class Ranks:
    """Two clocks in two threads that agree on the maximum of whatever each has to say, as ranks do."""

    def __init__(self):
        self.gpus, self.said = [FakeGpu(), FakeGpu()], [None, None]
        self.barrier = threading.Barrier(2, timeout=2.0)
        self.clocks = [DeviceClock(gpu, agree=partial(self.agree, rank)) for rank, gpu in enumerate(self.gpus)]

    def agree(self, rank, *values):
        self.said[rank] = values
        self.barrier.wait()
        agreed = tuple(map(max, zip(*self.said, strict=True)))
        self.barrier.wait()
        return agreed

    def run(self, *calls):
        """Each rank's samples, for calls with one entry per rank."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: [sample(self.clocks[rank], call[rank]) for call in calls], range(2)))


def test_ranks_time_again_together_and_share_the_slowest_time():
    ranks = Ranks()
    prompt, slow = ranks.gpus[0].call(KERNEL), ranks.gpus[1].call(-3 * FIRST_SPIN, 4 * KERNEL)
    found = ranks.run((prompt, slow))
    assert ranks.gpus[0].spins == ranks.gpus[1].spins == [FIRST_CYCLES, 8 * FIRST_CYCLES]
    assert [clock.retries for clock in ranks.clocks] == [1, 1]
    assert [one.seconds for (one,) in found] == pytest.approx([4 * KERNEL] * 2, rel=1e-9)
    assert [clock.now for clock in ranks.clocks] == [one.seconds for (one,) in found]
    assert not any(one.late for (one,) in found)


def test_ranks_end_together_at_the_cap():
    """One rank's call waits for the device: the prompt one must try as often, and be late with it."""
    ranks = Ranks()
    found = ranks.run((ranks.gpus[0].call(KERNEL), ranks.gpus[1].item))
    assert all(one.late for (one,) in found)
    assert [len(gpu.spins) for gpu in ranks.gpus] == [ATTEMPTS_TO_CAP] * 2


@pytest.mark.parametrize("after", [1, 2, 8], ids=lambda n: f"{n} tight rounds")
def test_ranks_spin_alike_after_one_of_them_was_short_of_time(after):
    """Else one rank is at its cap and ends a late round while another times it again, and waits for it for ever."""
    ranks = Ranks()
    cap = MAX_CYCLES / MHZ / 1e6
    tight = [(ranks.gpus[0].call(KERNEL), ranks.gpus[1].call(-0.8 * min(2**n * FIRST_SPIN, cap), KERNEL)) for n in range(after)]
    ranks.run(*tight)
    assert ranks.clocks[0].cycles == ranks.clocks[1].cycles
    ranks.run((ranks.gpus[0].item, ranks.gpus[1].item))
    assert ranks.gpus[0].spins == ranks.gpus[1].spins


def test_each_rank_calibrates_its_own_overhead():
    ranks = Ranks()
    for n, (gpu, clock) in enumerate(zip(ranks.gpus, ranks.clocks, strict=True)):
        gpu.event_seconds, gpu.empty_spin, clock.kernel = (n + 1) * 1e-6, 1.3e-6, 1.3e-6
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(DeviceClock.reset, ranks.clocks))
    assert [clock.overhead for clock in ranks.clocks] == pytest.approx([1e-6, 2e-6], rel=1e-6)


def test_agree_sees_device_time_without_the_overhead():
    gpu, seen = FakeGpu(event_seconds=3e-6), []
    sample(DeviceClock(gpu, 3e-6, agree=lambda *said: seen.append(said[0]) or said), gpu.call(KERNEL))
    assert seen == pytest.approx([KERNEL], rel=1e-9)


def test_calibrate_gives_the_bracket_without_the_spin_in_it():
    gpu = FakeGpu(event_seconds=2.2e-6, empty_spin=1.3e-6)
    found = calibrate(gpu, lambda: 1.3e-6)
    assert found.seconds == pytest.approx(2.2e-6, rel=1e-6)
    assert found.empty_spin == pytest.approx(3.5e-6, rel=1e-6)
    assert "minus" in found.source
    assert sample(DeviceClock(gpu, found.seconds), gpu.call(KERNEL)).seconds == pytest.approx(KERNEL, rel=1e-6)


@pytest.mark.parametrize("change", [1e-6, -1e-6])
def test_each_case_starts_with_the_overhead_as_it_is_by_then(change):
    gpu = FakeGpu(event_seconds=3e-6, empty_spin=1.3e-6)
    found = calibrate(gpu, lambda: 1.3e-6)
    clock = DeviceClock(gpu, found.seconds, found.empty_spin, kernel=found.kernel)
    gpu.event_seconds += change
    assert sample(clock, gpu.call(KERNEL)).seconds == pytest.approx(KERNEL + change, rel=1e-6)
    clock.reset()
    assert clock.overhead == pytest.approx(3e-6 + change, rel=1e-6)
    assert sample(clock, gpu.call(KERNEL)).seconds == pytest.approx(KERNEL, rel=1e-6)


def test_calibrate_without_a_profiler_says_so():
    gpu = FakeGpu(event_seconds=2.2e-6, empty_spin=1.3e-6)
    found = calibrate(gpu, lambda: None)
    assert found.seconds == pytest.approx(2.2e-6, rel=1e-6)
    assert found.empty_spin == pytest.approx(3.5e-6, rel=1e-6)
    assert "no kernel times" in found.source
    assert found.source != calibrate(gpu, lambda: 1.3e-6).source


def test_an_overhead_is_never_negative():
    assert calibrate(FakeGpu(event_seconds=1e-6), lambda: 5e-6).seconds == 0.0


def test_median_seconds_leaves_the_warm_up_out():
    gpu = FakeGpu()
    costs = iter([9e-3, 9e-3, 1e-6, 5e-6, 3e-6])
    found = clocks.median_seconds(DeviceClock(gpu), lambda: gpu.enqueue(next(costs)), rounds=3, warmup=2)
    assert found == pytest.approx(3e-6, rel=1e-6)
    assert next(costs, None) is None


@pytest.mark.parametrize("work", [0.0, 50e-6])
@pytest.mark.parametrize(("kernel", "calls"), [(1e-6, 50), (KERNEL, 50), (1e-2, 20), (1.0, 5)])
def test_an_enqueue_costs_the_host_s_work_whatever_the_kernel_does(work, kernel, calls):
    gpu, made = FakeGpu(), []
    run = gpu.call(-work, kernel)
    found = measure.enqueue_seconds(lambda: made.append(gpu.host) or run(), DeviceClock(gpu), kernel)
    assert found == pytest.approx(work + gpu.launch, rel=1e-6)
    assert len(made) == calls
    assert gpu.spins.count(MAX_CYCLES) == -(-calls // 10)  # so that no call of a batch finds the device idle


def host_clock(per_call):
    """A host clock, the time it reads, and a call that takes some seconds of it."""
    now = SimpleNamespace(seconds=100.0, calls=0)

    def call():
        now.seconds += per_call
        now.calls += 1

    return HostClock(lambda: now.seconds), now, call


@pytest.mark.parametrize("loops", [1, 7, 1000])
def test_host_clock_divides_a_round_by_its_loops(loops):
    clock, now, call = host_clock(2.0**-10)
    subject = Subject(call, loops)
    clock.prepare(subject)
    found = clock.sample(subject)
    assert now.calls == loops
    assert found[:2] == (2.0**-10, 2.0**-10)
    assert found.sm_mhz != found.sm_mhz  # nan: a CPU has no SM clock
    assert not found.late
    assert subject.samples == [found]


def test_host_clock_advances_by_one_call_a_round():
    clock, now, call = host_clock(2.0**-10)
    subject = Subject(call, 8)
    for n in range(1, 4):
        clock.prepare(subject)
        clock.sample(subject)
        now.seconds += 5.0  # time outside of samples
        assert clock() == n * 2.0**-10


def test_on_a_cpu_a_call_costs_itself_and_is_not_made_again():
    clock, now, call = host_clock(2.0**-4)
    assert measure.cost(call, clock, 2.0**-4) == {"host_us": 1e6 * 2.0**-4, "peak_bytes": None}
    assert now.calls == 0


@pytest.mark.parametrize("kernel", [None, 0.0])
def test_each_case_starts_with_the_short_spin(kernel):
    gpu = FakeGpu(launch=0.4 * FIRST_SPIN)  # so slow a host that calibrating needs a longer one
    clock = DeviceClock(gpu, kernel=kernel)
    sample(clock, gpu.item)
    assert clock.cycles == MAX_CYCLES
    clock.reset()
    assert clock.cycles == FIRST_CYCLES
