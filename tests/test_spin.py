"""The spin that hides the host's time: how long it is, when a round is measured again, and that ranks decide alike."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from fake_gpu import FIRST_SPIN, KERNEL, MHZ, FakeGpu, sample

from attn_impls.harness import measure
from attn_impls.harness.clock import FIRST_CYCLES, LEAD_CYCLES, MAX_CYCLES, RECENT, DeviceClock, Subject

ATTEMPTS_TO_CAP = 10  # each spin a little more than twice one before: the last one's, from the sixth on the second last's


def twice(spins):
    """The cycles of a spin for a host that needs as long as some first spins, and some launches."""
    return pytest.approx(min(2 * spins * FIRST_CYCLES, MAX_CYCLES), rel=0.1)


@pytest.mark.parametrize("spins", [1.7, 1.9, 2.4, 7.5, 39.0])
def test_a_host_slower_than_the_spin_is_timed_again_behind_one_of_twice_its_time(spins):
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    found = sample(clock, gpu.call(-spins * FIRST_SPIN, KERNEL))
    assert clock.retries == 1
    assert gpu.spins == [FIRST_CYCLES, twice(spins)]
    assert found.seconds == pytest.approx(KERNEL, rel=1e-9)
    assert not found.late


@pytest.mark.parametrize("late_too", [False, True])
def test_a_host_that_uses_most_of_a_spin_gets_a_longer_one_without_a_retry(late_too):
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    spins = 1.7 if late_too else 0.8
    call = gpu.call(-spins * FIRST_SPIN, KERNEL)
    for _ in range(4):
        assert sample(clock, call).seconds == pytest.approx(KERNEL, rel=1e-9)
    assert clock.retries == late_too
    assert gpu.spins == [FIRST_CYCLES] + [twice(spins)] * (3 + late_too)


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
    assert clock.spin.cycles == twice(3)
    assert clock.retries == RECENT // 5
    for _ in range(RECENT):
        sample(clock, prompt)
    assert clock.spin.cycles == FIRST_CYCLES


def test_two_subjects_in_turn_get_the_spin_that_the_slower_one_needs():
    gpu = FakeGpu()
    clock, prompt, slow = DeviceClock(gpu), gpu.call(KERNEL), gpu.call(-1.7 * FIRST_SPIN, KERNEL)
    for _ in range(2 * RECENT):
        sample(clock, slow)
        sample(clock, prompt)
    assert clock.retries == 1
    assert gpu.spins[1:] == [twice(1.7)] * len(gpu.spins[1:])


def test_spins_do_not_grow_past_the_cap():
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    for _ in range(3):
        sample(clock, gpu.call(-0.9 * MAX_CYCLES / MHZ / 1e6, KERNEL))
    assert clock.spin.cycles == max(gpu.spins) == MAX_CYCLES


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
    spin, tries = ("spin", LEAD_CYCLES), [FIRST_CYCLES, clock.spin.cycles]
    expected = [e for cycles in tries for e in ("flush", spin, "record", ("spin", cycles), "record", "record")]
    assert [entry for entry in gpu.log if entry != ("spin", 0)] == expected


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
    assert (clock.spin.cycles, clock.retries) == (MAX_CYCLES, ATTEMPTS_TO_CAP - 1)
    for _ in range(9):
        clock.prepare(subject)
        clock.sample(subject)
    assert clock.retries == ATTEMPTS_TO_CAP - 1  # at the cap, one try each
    assert gpu.log.count("flush") == ATTEMPTS_TO_CAP + 9
    facts = measure.facts(measure.Timing(subject.samples, None, clock.retries), clock)
    assert facts["host_bound"]
    assert facts["late_rounds"] == 10
    assert facts["remeasured_rounds"] == ATTEMPTS_TO_CAP - 1


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
    assert ranks.gpus[0].spins == ranks.gpus[1].spins == [FIRST_CYCLES, twice(3)]
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
    assert ranks.clocks[0].spin.cycles == ranks.clocks[1].spin.cycles
    ranks.run((ranks.gpus[0].item, ranks.gpus[1].item))
    assert ranks.gpus[0].spins == ranks.gpus[1].spins


def test_each_case_starts_with_the_short_spin():
    gpu = FakeGpu()
    clock = DeviceClock(gpu)
    sample(clock, gpu.item)
    assert clock.spin.cycles == MAX_CYCLES
    clock.reset()
    assert clock.spin.cycles == FIRST_CYCLES
