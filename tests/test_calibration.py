"""What the device clock takes itself, on a fake timeline."""

import pytest
from fake_gpu import KERNEL, FakeGpu, sample

from attn_impls.harness.calibration import calibrate
from attn_impls.harness.clock import FIRST_CYCLES, DeviceClock


def test_calibrate_gives_the_bracket_without_the_spin_in_it():
    gpu = FakeGpu(event_seconds=2.2e-6, empty_spin=1.3e-6)
    found = calibrate(gpu, lambda: 1.3e-6)
    assert found.seconds == pytest.approx(2.2e-6, rel=1e-6)
    assert found.empty_spin == pytest.approx(3.5e-6, rel=1e-6)
    assert "minus" in found.source
    assert sample(DeviceClock(gpu, found.seconds), gpu.call(KERNEL)).seconds == pytest.approx(KERNEL, rel=1e-6)


@pytest.mark.parametrize("factor", [1.0005, 1 / 1.0005])
def test_calibrate_while_the_card_s_clock_rises_or_falls(factor):
    gpu = FakeGpu(mhz=1400.0, event_seconds=2.2e-6, empty_spin=1.3e-6)
    spin, longs = gpu.spin, 0

    def drifting(cycles):
        nonlocal longs
        gpu.mhz *= factor
        longs += cycles == 4 * FIRST_CYCLES
        spin(cycles + 400_000 * (cycles == 4 * FIRST_CYCLES and longs == 15))  # and one takes longer than it should

    gpu.spin = drifting
    found = calibrate(gpu, lambda: 1.3e-6)
    assert 1.4 < max(gpu.mhz / 1400, 1400 / gpu.mhz) < 2
    assert found.seconds == pytest.approx(2.2e-6, rel=1e-6)
    assert found.empty_spin == pytest.approx(3.5e-6, abs=0.2e-6)  # 10 µs and more off where one spin came after the other


def test_calibrate_without_a_profiler_says_so():
    gpu = FakeGpu(event_seconds=2.2e-6, empty_spin=1.3e-6)
    found = calibrate(gpu, lambda: None)
    assert found.seconds == pytest.approx(2.2e-6, rel=1e-6)
    assert found.empty_spin == pytest.approx(3.5e-6, rel=1e-6)
    assert "no kernel times" in found.source
    assert found.source != calibrate(gpu, lambda: 1.3e-6).source


def test_an_overhead_is_never_negative():
    assert calibrate(FakeGpu(event_seconds=1e-6), lambda: 5e-6).seconds == 0.0
