"""The clocks on a fake timeline: what they read, and what they take off."""

import weakref
from functools import partial
from types import SimpleNamespace

import pytest
from fake_gpu import FIRST_SPIN, KERNEL, MHZ, FakeGpu, sample
from fakes import Rounds

from attn_impls.harness import clock as clocks
from attn_impls.harness import measure
from attn_impls.harness.calibration import calibrate
from attn_impls.harness.clock import FIRST_CYCLES, LEAD_CYCLES, DeviceClock, HostClock, Subject


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
    assert (found.late, clock.retries, clock.spin.cycles) == (False, 0, FIRST_CYCLES)


def test_a_host_that_is_slow_before_every_spin_gets_a_longer_lead():
    gpu = FakeGpu(launch=40e-6)  # two launches of a lead of 80 µs
    clock = DeviceClock(gpu)
    found = [sample(clock, gpu.call(KERNEL)) for _ in range(20)]
    assert all(one.seconds == pytest.approx(KERNEL, rel=1e-9) for one in found)
    assert found[0].sm_mhz != found[0].sm_mhz
    assert [one.sm_mhz for one in found[1:]] == pytest.approx(19 * [MHZ], rel=1e-9)
    assert clock.lead.cycles == pytest.approx(2 * 3 * 40e-6 * MHZ * 1e6, rel=1e-9)


def test_the_cache_is_cold_and_the_device_idle_before_every_spin():
    gpu = FakeGpu()
    DeviceClock(gpu).prepare(Subject(gpu.call(KERNEL)))
    idle = 30e-6 + gpu.launch  # the flush, waited for
    spins = (LEAD_CYCLES + FIRST_CYCLES) / MHZ / 1e6
    assert gpu.log == ["flush", ("spin", LEAD_CYCLES), "record", ("spin", FIRST_CYCLES)]
    assert gpu.drained == pytest.approx(idle + gpu.launch + spins, rel=1e-9)
    assert gpu.host == pytest.approx(idle + 3 * gpu.launch, rel=1e-9)  # it does not wait for the spin


SLOW = 0.9e-6


def launching(gpu, launches):
    """A call of some launches, of which every fourth in the process begins late."""

    def call():
        for _ in range(launches):
            gpu.launched += 1
            gpu.enqueue(KERNEL + SLOW * (gpu.launched % 4 == 0))

    return call


def counting_gpu(start):
    gpu = FakeGpu()
    gpu.launched = start
    flush, spin = gpu.flush, gpu.spin

    def counted(enqueue, *args):
        gpu.launched += 1
        enqueue(*args)

    gpu.flush, gpu.spin = partial(counted, flush), partial(counted, spin)
    return gpu


@pytest.mark.parametrize("looking", [0, 1, 2, 3])
@pytest.mark.parametrize("launches", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_no_case_meets_the_late_launch_in_every_round_nor_in_none(launches, rounds, looking):
    """Whatever it is timed beside, however many launches look at its output, and wherever the process stands."""
    few = launches // 4 + (launches % 4 == 3)
    for partner in (None, *range(1, 8)):
        for start in range(4):
            gpu = counting_gpu(start)
            beside = launching(gpu, partner) if partner else None
            seen = launching(gpu, looking)
            calls = launching(gpu, launches), beside
            timing = measure.run(Rounds(), DeviceClock(gpu), *calls, rounds, seen=lambda _, seen=seen: seen())
            assert timing.median == pytest.approx(launches * KERNEL + few * SLOW, rel=1e-9)
            met = {round((one.seconds - launches * KERNEL) / SLOW) for one in timing.samples}
            assert len(met) == (2 if launches % 4 else 1)


@pytest.mark.parametrize("stalls", [0, 1, 2])
def test_an_output_is_seen_once_after_its_kept_sample_has_ended(stalls):
    gpu, made, seen = FakeGpu(event_seconds=2e-6), [], []

    def call():
        gpu.log.append("call")
        gpu.work(3 * FIRST_SPIN * 6 ** len(made) if len(made) < stalls else 0.0)  # longer each time than the spin by then
        gpu.enqueue(KERNEL)
        made.append(len(made))
        return made[-1]

    def look(out):
        assert gpu.host >= gpu.drained  # the device has ended
        gpu.log.append("look")
        gpu.enqueue(5e-3)
        seen.append(out)

    clock, subject = DeviceClock(gpu, 2e-6), Subject(call, seen=look)
    for n in range(3):
        clock.prepare(subject)
        assert clock.sample(subject).seconds == pytest.approx(KERNEL, rel=1e-9)
        assert seen == [stalls + kept for kept in range(n + 1)]
    assert clock.retries == stalls
    assert clock.now == pytest.approx(3 * KERNEL, rel=1e-9)
    calls = [at for at, entry in enumerate(gpu.log) if entry == "call"]
    assert all(gpu.log[at - 1] == gpu.log[at + 1] == "record" for at in calls)
    assert [gpu.log[at + 2 : at + 3] for at in calls] == stalls * [["flush"]] + 3 * [["look"]]


def test_the_output_of_a_late_round_is_gone_before_the_next_is_made():
    gpu, alive = FakeGpu(), []

    def call():
        alive.append(sum(one() is not None for one in made))
        gpu.work(2 * FIRST_SPIN if not made else 0.0)
        out = set()
        made.append(weakref.ref(out))
        return out

    made = []
    clock, subject = DeviceClock(gpu), Subject(call)
    for _ in range(3):
        clock.prepare(subject)
        clock.sample(subject)
    assert clock.retries == 1
    assert alive == 4 * [0]


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


def test_agree_sees_device_time_without_the_overhead():
    gpu, seen = FakeGpu(event_seconds=3e-6), []
    sample(DeviceClock(gpu, 3e-6, agree=lambda *said: seen.append(said[0]) or said), gpu.call(KERNEL))
    assert seen == pytest.approx([KERNEL], rel=1e-9)


def test_median_seconds_leaves_the_warm_up_out():
    gpu = FakeGpu()
    costs = iter([9e-3, 9e-3, 1e-6, 5e-6, 3e-6])
    found = clocks.median_seconds(DeviceClock(gpu), lambda: gpu.enqueue(next(costs)), rounds=3, warmup=2)
    assert found == pytest.approx(3e-6, rel=1e-6)
    assert next(costs, None) is None


@pytest.mark.parametrize("work", [0.0, 50e-6])
@pytest.mark.parametrize(("kernel", "calls"), [(1e-6, 25), (KERNEL, 25), (1e-2, 20), (1.0, 5)])
def test_an_enqueue_costs_the_host_s_work_whatever_the_kernel_does(work, kernel, calls):
    gpu, made = FakeGpu(), []
    run = gpu.call(-work, kernel)
    found = measure.enqueue_seconds(lambda: made.append(gpu.host) or run(), DeviceClock(gpu), kernel)
    assert found == pytest.approx(work + gpu.launch, rel=1e-6)
    assert len(made) == calls
    spins = 1 + -(-(calls - 1) // 10)  # so that no call of a batch finds the device idle
    assert gpu.log.count(("spin", measure.ENQUEUE_CYCLES)) == spins


def test_calls_that_cost_the_host_much_are_not_enqueued_behind_one_spin_together():
    gpu, made = FakeGpu(), []
    run = gpu.call(-1.5e-3, KERNEL)
    assert measure.enqueue_seconds(lambda: made.append(gpu.log.count("flush")) or run(), DeviceClock(gpu), KERNEL) > 1.5e-3
    assert made == list(range(1, 26))


def host_clock(per_call):
    """A host clock, the time it reads, and a call that takes some seconds of it."""
    now = SimpleNamespace(seconds=100.0, calls=0)

    def call():
        now.seconds += per_call
        now.calls += 1

    return HostClock(lambda: now.seconds), now, call


def test_host_clock_shows_the_last_output_of_a_round_after_it():
    clock, now, call = host_clock(2.0**-10)
    seen = []

    def look(out):
        seen.append(out)
        now.seconds += 5.0

    subject = Subject(lambda: call() or now.calls, 8, seen=look)
    for n in (1, 2):
        clock.prepare(subject)
        assert clock.sample(subject).seconds == 2.0**-10
        assert seen == [8, 16][:n]


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
