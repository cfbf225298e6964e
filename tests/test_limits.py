"""Limits against figures worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from attn_impls.harness import limits
from attn_impls.harness.clock import HostClock
from attn_impls.harness.limits import DATASHEETS, Ceiling, physical_bound, roofline
from attn_impls.workload import Workload

H200 = DATASHEETS["NVIDIA H200"]
HERE = Ceiling(tflops=2.0, tb_per_s=0.5)
SEED = "b1-h32-s8192-d128-bf16"  # 4 · 32 · 8192² · 128 = 1.0995e12 FLOP; 4 · 32 · 8192 · 128 · 2 = 268e6 bytes
DECODE = "b64-h32kv8-q1kv8192-d128-causal-bf16"  # 2 · 64 · 8 · 8192 · 128 · 2 = 2.1475e9 bytes of K and V
SMS, MHZ = 132, 1980


def bound(identity, direction="forward", gpu=H200, sms=SMS, mhz=MHZ):
    return physical_bound(Workload.parse(identity), direction, gpu, sms, mhz)


def test_the_peak_of_an_h200_at_its_highest_clock():
    assert Workload.parse(SEED).flops() / bound(SEED) / 1e12 == pytest.approx(1070.5, abs=0.1)


@pytest.mark.parametrize(
    ("identity", "direction", "milliseconds"),
    [
        (SEED, "forward", 1.0271),
        ("b1-h32-s8192-d128-fp16", "forward", 1.0271),
        ("b1-h32-s8192-d128-causal-bf16", "forward", 0.51362),  # 8192 · 8193 / 2 pairs
        (SEED, "backward", 2.0542),  # 2 × forward: no recomputation
        ("b1-h32-s8192-d128-fp32", "forward", 2.0542),  # TF32: half the rate of bf16
        (DECODE, "forward", 0.44751),  # (2.1475e9 + 0.000524e9) bytes / 4.8e12
        ("b64-h32kv8-q1kv8192-d128-causal-fp32", "forward", 0.89502),
    ],
)
def test_physical_bound_on_an_h200(identity, direction, milliseconds):
    assert bound(identity, direction) * 1e3 == pytest.approx(milliseconds, rel=2e-4)


def test_physical_bound_reads_only_the_keys_in_the_window():
    whole, part = bound(DECODE), bound("b64-h32kv8-q1kv8192-d128-causal-win4096-bf16")
    q = 64 * 32 * 128 * 2 / 4.8e12
    assert part - q == pytest.approx((whole - q) / 2, rel=1e-9)


def test_physical_bound_of_backward_reads_the_output_s_gradient_too():
    decode = Workload.parse(DECODE)
    out = decode.batch * decode.heads * decode.v_head_dim * 2
    assert bound(DECODE, "backward") - bound(DECODE) == pytest.approx(out / 4.8e12, rel=1e-6)


@pytest.mark.parametrize("identity", [SEED, DECODE, "b1-h32-s8192-d128-fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_cannot_be_known_never_fails(identity, direction):
    assert bound(identity, direction, gpu=None) == 0.0
    assert bound(identity, direction, mhz=0.0) == 0.0  # NVML hidden


@pytest.mark.parametrize("identity", [SEED, DECODE, "b1-h32-s8192-d128-fp32", "b2-h6kv3-s1023-d64-causal-bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_physical_bound_is_below_the_roofline(identity, direction):
    w = Workload.parse(identity)
    assert 0 < bound(identity, direction) <= roofline(w, direction, H200, HERE).seconds


@pytest.mark.parametrize(
    ("identity", "direction", "milliseconds", "which"),
    [
        (SEED, "forward", 1.1112, "compute"),
        (SEED, "backward", 2.7780, "compute"),  # 2.5 × forward
        ("b1-h32-s8192-d128-fp32", "forward", 16.435, "compute"),  # 66.9 TFLOP/s outside the tensor cores
        (DECODE, "forward", 0.44761, "memory"),
        ("b64-h32kv8-q1kv8192-d128-causal-win4096-bf16", "forward", 0.22391, "memory"),
    ],
)
def test_roofline_of_an_h200(identity, direction, milliseconds, which):
    found = roofline(Workload.parse(identity), direction, H200, HERE)
    assert found.seconds * 1e3 == pytest.approx(milliseconds, rel=2e-4)
    assert (found.bound, found.source) == (which, "datasheet")


@pytest.mark.parametrize(
    ("identity", "seconds", "which"),
    [
        (SEED, 1.0995e12 / 2e12, "compute"),
        (DECODE, 2.14853e9 / 0.5e12, "memory"),  # K, V, q and out
    ],
)
def test_roofline_of_an_unlisted_device_is_what_was_measured(identity, seconds, which):
    found = roofline(Workload.parse(identity), "forward", None, HERE)
    assert found.seconds == pytest.approx(seconds, rel=1e-4)
    assert (found.bound, found.source) == (which, "measured")


@pytest.mark.parametrize("name", DATASHEETS)
def test_datasheets_are_dense_figures_in_their_units(name):
    gpu = DATASHEETS[name]
    assert gpu.bf16 == pytest.approx(2 * gpu.tf32, rel=0.03)
    assert gpu.fp32 < gpu.tf32
    assert 0.1 < gpu.bandwidth < 10  # TB/s
    assert gpu.flop_per_sm_clock in (1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("name", "sms", "boost_mhz"),
    [
        ("NVIDIA B200", 148, 1850),
        ("NVIDIA H200", 132, 1830),
        ("NVIDIA H100 80GB HBM3", 132, 1830),
        ("NVIDIA H100 PCIe", 114, 1620),
        ("NVIDIA A100-SXM4-80GB", 108, 1410),
        ("NVIDIA A100-SXM4-40GB", 108, 1410),
        ("NVIDIA A100 80GB PCIe", 108, 1410),
        ("NVIDIA A100-PCIE-40GB", 108, 1410),
        ("NVIDIA L40S", 142, 2520),
        ("NVIDIA L4", 58, 2040),
        ("NVIDIA A10", 72, 1695),
    ],
)
def test_the_tensor_peak_is_sms_times_boost_clock(name, sms, boost_mhz):
    gpu = DATASHEETS[name]
    assert sms * gpu.flop_per_sm_clock * boost_mhz * 1e6 == pytest.approx(gpu.bf16 * 1e12, rel=0.02)


def test_newer_memory_is_faster():
    order = ["A100-SXM4-40GB", "A100-SXM4-80GB", "H100 80GB HBM3", "H200", "B200"]
    bandwidths = [DATASHEETS[f"NVIDIA {name}"].bandwidth for name in order]
    assert bandwidths == sorted(set(bandwidths))


@pytest.mark.parametrize(("dtype", "peak"), [(torch.bfloat16, 989.5), (torch.float16, 989.5), (torch.float32, 66.9)])
def test_datasheet_peak_of_a_dtype(dtype, peak):
    assert limits.datasheet_tflops(H200, dtype) == peak


def test_measured_ceilings_count_2n3_flops_and_both_directions_of_a_copy(monkeypatch):
    n, copied = 16, 1 << 12
    monkeypatch.setattr(limits, "MATMUL_SIZE", {"cpu": n})
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": copied})
    reads, last = iter(range(10_000)), SimpleNamespace(at=0.0)

    def host_time():  # every call takes 1 s
        last.at += next(reads) % 2
        return last.at

    found = limits.measure_ceiling(HostClock(host_time), "cpu", torch.float32)
    assert found.tflops == pytest.approx(2 * n**3 / 1e12)
    assert found.tb_per_s == pytest.approx(copied / 1e12)


INFO = {
    "limit_s": 1.1112e-3,
    "limit_bound": "compute",
    "limit_source": "datasheet",
    "ceiling_tflops": 788.4,
    "ceiling_tb_per_s": 4.31,
    "datasheet_tflops": 989.5,
    "datasheet_tb_per_s": 4.8,
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "limit 1.11 ms (bf16 matmul ceiling 788 TFLOP/s here, 989.5 datasheet)"),
        ({"limit_bound": "memory", "limit_s": 4.2e-5}, "limit 42 µs (copy ceiling 4310 GB/s here, 4800 datasheet)"),
        (
            {"limit_source": "measured", "datasheet_tflops": None, "datasheet_tb_per_s": None},
            "limit 1.11 ms (matmul ceiling 788 TFLOP/s here)",
        ),
        (
            {"limit_source": "measured", "limit_bound": "memory", "datasheet_tflops": None, "datasheet_tb_per_s": None},
            "limit 1.11 ms (copy ceiling 4310 GB/s here)",
        ),
    ],
)
def test_the_limit_in_words(changes, line):
    assert limits.describe(Workload.parse(SEED), INFO | changes) == line
