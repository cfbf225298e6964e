"""How fast the hardware could be: datasheet peaks, ceilings measured in the session, and what physics rules out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..workload import DTYPE_NAMES, Workload
from .clock import Clock, median_seconds

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
ENOUGH_SECONDS = 0.02  # of a matmul on a CPU, which may lack the dtype's instructions: it need not be larger
COPY_BYTES = {"cuda": 4 << 30, "cpu": 128 << 20}
CEILING_ROUNDS = {"cuda": 10, "cpu": 5}


@dataclass(frozen=True)
class Gpu:
    """A datasheet: dense peaks in TFLOP/s, memory bandwidth in TB/s, bf16 FLOP per SM and clock on the tensor cores."""

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    flop_per_sm_clock: int


# By the name the driver reports. Sources: NVIDIA's datasheets of each card, dense figures (half of "with sparsity").
DATASHEETS = {
    "NVIDIA B200": Gpu(2250, 1125, 75, 8.0, 8192),
    "NVIDIA H200": Gpu(989.5, 494.7, 66.9, 4.8, 4096),
    "NVIDIA H100 80GB HBM3": Gpu(989.5, 494.7, 66.9, 3.35, 4096),
    "NVIDIA H100 NVL": Gpu(835.5, 417.5, 60, 3.9, 4096),
    "NVIDIA H100 PCIe": Gpu(756.5, 378, 51.2, 2.0, 4096),
    "NVIDIA A100-SXM4-80GB": Gpu(312, 156, 19.5, 2.039, 2048),
    "NVIDIA A100-SXM4-40GB": Gpu(312, 156, 19.5, 1.555, 2048),
    "NVIDIA A100 80GB PCIe": Gpu(312, 156, 19.5, 1.935, 2048),
    "NVIDIA A100-PCIE-40GB": Gpu(312, 156, 19.5, 1.555, 2048),
    "NVIDIA L40S": Gpu(362, 183, 91.6, 0.864, 1024),
    "NVIDIA L4": Gpu(121, 60, 30.3, 0.3, 1024),
    "NVIDIA A10": Gpu(125, 62.5, 31.2, 0.6, 1024),
}


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this session for a dtype: a large matmul and a large copy."""

    tflops: float
    tb_per_s: float


@dataclass(frozen=True)
class Limit:
    """The least time a workload could take: the roofline of a datasheet or, for unlisted devices, of the ceilings."""

    seconds: float
    bound: str  # "compute" or "memory", whichever is slower
    source: str  # "datasheet" or "measured"


def measure_ceiling(clock: Clock, device: str, dtype: torch.dtype) -> Ceiling:
    """Median of a large matmul on random data, and of a large copy (bytes read plus bytes written).

    On a CPU the matmul is the faster of the dtype's and float32's: where a dtype is emulated, attention computes in float32.
    """
    rounds, largest = CEILING_ROUNDS[device], MATMUL_SIZE[device]
    smaller = [n for n in (128, 256, 512) if n < largest] if device == "cpu" else []

    def sizes(one: torch.dtype) -> list[int]:  # float32's is fixed: runs are compared by it
        return [largest] if one == torch.float32 else [*smaller, largest]

    tflops = max(
        _matmul_tflops(clock, device, one, sizes(one), rounds) for one in ({dtype, torch.float32} if device == "cpu" else {dtype})
    )
    source = torch.empty(COPY_BYTES[device] // 2, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = median_seconds(clock, lambda: target.copy_(source), rounds)
    return Ceiling(tflops, 2 * source.nbytes / copy / 1e12)


def _matmul_tflops(clock: Clock, device: str, dtype: torch.dtype, sizes: list[int], rounds: int) -> float:
    """Of the first of some sizes that takes long enough, or of the last."""
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        multiply = partial(torch.matmul, a, b)
        if n == sizes[-1] or median_seconds(clock, multiply, 1, warmup=1) >= ENOUGH_SECONDS:
            break
    return 2 * n**3 / median_seconds(clock, multiply, rounds) / 1e12


def datasheet_tflops(gpu: Gpu, dtype: torch.dtype) -> float:
    return gpu.fp32 if dtype == torch.float32 else gpu.bf16


def roofline(w: Workload, direction: str, gpu: Gpu | None, ceiling: Ceiling) -> Limit:
    """max(FLOPs / peak, bytes / bandwidth)."""
    if gpu:
        tflops, tb_per_s, source = datasheet_tflops(gpu, w.dtype), gpu.bandwidth, "datasheet"
    else:
        tflops, tb_per_s, source = ceiling.tflops, ceiling.tb_per_s, "measured"
    compute = w.flops(direction) / tflops / 1e12
    memory = w.bytes(direction) / tb_per_s / 1e12
    return Limit(max(compute, memory), "compute" if compute >= memory else "memory", source)


def facts(w: Workload, direction: str, gpu: Gpu | None, ceiling: Ceiling, seconds: float) -> dict[str, Any]:
    """The flat extra_info about the limit of a case that took some seconds."""
    limit = roofline(w, direction, gpu, ceiling)
    return {
        "limit_s": limit.seconds,
        "limit_bound": limit.bound,
        "limit_source": limit.source,
        "percent_of_limit": 100 * limit.seconds / seconds,
        "ceiling_tflops": ceiling.tflops,
        "ceiling_tb_per_s": ceiling.tb_per_s,
        "datasheet_tflops": gpu and datasheet_tflops(gpu, w.dtype),
        "datasheet_tb_per_s": gpu and gpu.bandwidth,
    }


def physical_bound(w: Workload, direction: str, gpu: Gpu | None, sms: int, max_mhz: float) -> float:
    """Seconds below which a time cannot be true; 0 for an unlisted device or a CPU.

    Lenient on purpose: the fewest FLOPs (backward 2 × forward, without recomputation; both 3 ×) at the tensor cores' rate
    for the highest SM clock (TF32's for fp32), and only the bytes that must be read through a cold L2.
    """
    if gpu is None or not max_mhz:
        return 0.0
    flops = w.flops("forward") * {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    rate = sms * gpu.flop_per_sm_clock * max_mhz * 1e6 / (2 if w.dtype == torch.float32 else 1)
    written = w.batch * w.heads * w.q_len * w.v_head_dim * w.dtype.itemsize
    dout = 0 if direction == "forward" else written
    read = w.bytes("forward") - written + dout
    return max(flops / rate, read / (gpu.bandwidth * 1e12))


def describe(w: Workload, info: dict) -> str:
    """One line about a workload's limit, from a case's extra_info."""
    seconds = info.get("limit_s")
    if seconds is None:
        return "limit unknown"
    limit = f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
    if info.get("limit_bound") == "memory":
        what, unit, key, factor, form = "copy", "GB/s", "tb_per_s", 1e3, ".4g"
    else:
        what, unit, key, factor, form = "matmul", "TFLOP/s", "tflops", 1, ".3g"
        if info.get("datasheet_tflops"):  # on a CPU it may be float32's
            what = f"{DTYPE_NAMES[w.dtype]} matmul"
    ceiling, datasheet = info.get(f"ceiling_{key}"), info.get(f"datasheet_{key}")
    known = [f"{what} ceiling {ceiling * factor:{form}} {unit} here"] if ceiling else []
    known += [f"{datasheet * factor:.4g} datasheet"] if datasheet else []
    return f"limit {limit}" + (f" ({', '.join(known)})" if known else "")
