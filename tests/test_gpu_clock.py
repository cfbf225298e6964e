"""The device clock against the hardware: its quantum, CUPTI, linearity, hosts that dawdle, and a card that throttles."""

import statistics
import time

import pytest
import torch
from fakes import Rounds
from torch.nn.functional import scaled_dot_product_attention

from attn_impls.harness import measure, profile
from attn_impls.harness.calibration import calibrate
from attn_impls.harness.clock import CudaDriver, DeviceClock, Subject, median_seconds

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def driver():
    return CudaDriver()


@pytest.fixture(scope="module")
def overhead(driver):
    found = calibrate(driver, profile.empty_spin_seconds)
    assert "CUPTI" in found.source
    assert 0 < found.seconds < 10e-6
    return found


@pytest.fixture
def clock(driver, overhead):
    return DeviceClock(driver, overhead.seconds, overhead.empty_spin)


def qkv(batch, heads, length, dim):
    return [torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def samples(clock, call, rounds=50, warmup=5):
    subject = Subject(call)
    for _ in range(warmup + rounds):
        clock.prepare(subject)
        clock.sample(subject)
    return subject.samples[warmup:]


def median_us(clock, call, rounds=50):
    clock.reset()
    return 1e6 * statistics.median(sample.seconds for sample in samples(clock, call, rounds))


def test_quantum_of_events_is_far_below_a_kernel(driver, capsys):
    clock = DeviceClock(driver)
    readings = {round(sample.seconds * 1e9) for sample in samples(clock, lambda: driver.spin(0), 200)}
    steps = [b - a for a, b in zip(sorted(readings), sorted(readings)[1:], strict=False)]
    with capsys.disabled():
        print(f"\n  event readings differ by at least {min(steps)} ns; {len(readings)} distinct in 200")
    assert min(steps) <= 100


def sdpa(*shape):
    q, k, v = qkv(*shape)
    return lambda: scaled_dot_product_attention(q, k, v)


def pinned(backend, *shape):
    from torch.nn.attention import sdpa_kernel

    q, k, v = qkv(*shape)

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return call


def eager(*shape):
    q, k, v = qkv(*shape)
    return lambda: torch.softmax((q @ k.transpose(-1, -2)) * 0.1, -1) @ v


SHAPES = [(1, 8, 128, 64), (8, 16, 512, 64), (1, 8, 2048, 128), (1, 32, 2048, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"b{s[0]}-h{s[1]}-s{s[2]}-d{s[3]}")
@pytest.mark.parametrize("kind", ["flash", "cudnn", "eager"])
def test_agreement_with_cupti(clock, kind, shape, capsys):
    backends = torch.nn.attention.SDPBackend
    call = {
        "flash": lambda: pinned(backends.FLASH_ATTENTION, *shape),
        "cudnn": lambda: pinned(backends.CUDNN_ATTENTION, *shape),
        "eager": lambda: eager(*shape),
    }[kind]()
    before = median_us(clock, call)
    runs = profile.device_operations(call, 30, before=clock.quiet)
    after = median_us(clock, call)
    assert len(runs) == 30
    busy = 1e6 * statistics.median(sum(o.stop - o.start for o in run) for run in runs)
    span = 1e6 * statistics.median(run[-1].stop - run[0].start for run in runs)
    measured = (before + after) / 2
    operations = len(runs[0])
    with capsys.disabled():
        print(f"\n  {kind:6} {shape}: clock {before:.2f} {after:.2f} µs, CUPTI busy {busy:.2f} span {span:.2f}, {operations} ops")
    if operations == 1:
        assert abs(measured - busy) <= max(0.5, 0.01 * busy)
    else:
        drift = 0.01 * span  # the card's clock between the passes
        assert busy - 0.5 - drift <= measured <= span + 0.5 + drift


def test_a_dawdling_host_changes_nothing(clock):
    call = sdpa(1, 8, 2048, 128)

    def dawdling():
        until = time.perf_counter() + 200e-6
        while time.perf_counter() < until:
            pass
        return call()

    plain, slow = Subject(call), Subject(dawdling)
    for _ in range(110):
        for subject in (plain, slow):
            clock.prepare(subject)
            clock.sample(subject)
    medians = [statistics.median(s.seconds for s in subject.samples[10:]) for subject in (plain, slow)]
    assert medians[1] == pytest.approx(medians[0], rel=0.005)
    assert statistics.median(s.host_seconds for s in slow.samples) > 200e-6


def test_a_call_that_waits_for_the_device_is_host_bound(clock):
    call = sdpa(1, 8, 512, 64)
    timing = measure.Timing(samples(clock, lambda: call().sum().item(), 20), None, 0)
    assert measure.facts(timing, clock)["host_bound"]
    timing = measure.Timing(samples(clock, call, 20), None, 0)
    assert not measure.facts(timing, clock)["host_bound"]


def test_linear_in_the_work(clock, driver, capsys):
    """Spins of known cycles: the time beyond the shortest is proportional, at the SM clock that the clock itself reports."""
    base_cycles = 20_000
    base = samples(clock, lambda: driver.spin(base_cycles), 50)
    rates = []
    for cycles in (100_000, 400_000, 1_600_000):
        found = samples(clock, lambda: driver.spin(cycles), 50)  # noqa: B023
        extra = statistics.median(s.seconds for s in found) - statistics.median(s.seconds for s in base)
        rates.append((cycles - base_cycles) / extra * 1e-6)
        mhz = statistics.median(s.sm_mhz for s in found)
        with capsys.disabled():
            print(f"\n  {cycles} cycles: {rates[-1]:.1f} MHz by the time beyond the shortest, {mhz:.1f} MHz as reported", end="")
        assert mhz == pytest.approx(rates[-1], rel=0.005)
    assert max(rates) == pytest.approx(min(rates), rel=0.005)


def test_events_run_at_the_hosts_rate(driver, capsys):
    """A second by the GPU's events is a second by the host's clock."""
    start, stop = driver.event(), driver.event()
    driver.spin(1000)
    driver.synchronize()
    began = time.perf_counter()
    start.record()
    for _ in range(500):
        driver.spin(4_000_000)
    stop.record()
    stop.synchronize()
    host = time.perf_counter() - began
    device = start.elapsed_time(stop) * 1e-3
    with capsys.disabled():
        print(f"\n  {device:.6f} s by events, {host:.6f} s by the host", end="")
    assert device == pytest.approx(host, rel=1e-3)


def test_paired_ratio_of_a_kernel_with_itself_while_the_card_heats(clock, capsys):
    call = sdpa(1, 32, 8192, 128)
    with capsys.disabled():
        for _ in range(6):
            timing = measure.run(Rounds(), clock, call, call, rounds=100)
            ratio, low, high = measure.paired_ratio(timing)
            mhz = statistics.median(s.sm_mhz for s in timing.samples)
            print(f"\n  A/A {ratio:.4f} [{low:.4f}, {high:.4f}], median {timing.median * 1e6:.0f} µs, SM {mhz:.0f} MHz", end="")
            assert ratio == pytest.approx(1.0, abs=0.005)


def test_peak_bytes_counts_output_and_workspace():
    q, k, v = qkv(1, 4, 1024, 64)
    scores = 4 * 1024 * 1024 * 2
    peak = measure.peak_bytes(lambda: torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
    assert 2 * scores <= peak <= 4 * scores


def test_a_late_round_costs_less_than_a_quarter_second(clock):
    call = sdpa(1, 8, 512, 64)
    started = time.perf_counter()
    median_seconds(clock, call, 100)
    assert time.perf_counter() - started < 0.25
