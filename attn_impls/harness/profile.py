"""Which kernels a call runs, from a profiling pass of its own (never a timed one), and what their names mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .clock import make_ready

SPIN = "spin_kernel"  # torch.cuda._sleep

# the kernel a dispatching library chose: first match of a part of a kernel's name
FAMILIES = (
    ("flashinfer::PrefillWithKVCacheKernel", "fa3"),
    ("flashinfer::Batch", "fa2"),
    ("flashinfer::Single", "fa2"),
    ("cudnn", "cudnn"),
    ("flash_attention_for_cpu", "flash"),
    ("flash_attn_3", "flash3"),
    ("FlashAttnFwdSm90", "flash3"),
    ("pytorch_flash", "flash"),
    ("flash_fwd", "flash"),
    ("flash_bwd", "flash"),
    ("fmha_cutlass", "efficient"),
    ("mem_eff", "efficient"),
    ("splitKernel", "triton_splitk"),
)


class Operation(NamedTuple):
    """One thing the device did, times in seconds."""

    name: str
    start: float
    stop: float


def device_operations(call: Callable[[], Any], calls: int = 1, before: Callable[[], Any] = lambda: None) -> list[list[Operation]]:
    """For each of some calls, the kernels, copies and memsets that it made the GPU run, in order.

    Each call stands between two spin kernels, so that its own memsets are told from those of `before`.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            make_ready(call)
            before()
            torch.cuda._sleep(200_000)
            call()
            torch.cuda._sleep(0)
        torch.cuda.synchronize()
    operations = sorted(
        (
            Operation(event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
        ),
        key=lambda operation: operation.start,
    )
    found: list[list[Operation]] = []
    inside = False
    for operation in operations:
        if SPIN in operation.name:
            inside = not inside
            if inside:
                found.append([])
        elif inside:
            found[-1].append(operation)
    return found


def empty_spin_seconds() -> float | None:
    """Median duration of `torch.cuda._sleep(0)`'s kernel as CUPTI sees it; None where CUPTI sees nothing."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(50):
            torch.cuda._sleep(0)
        torch.cuda.synchronize()
    times = sorted(event.time_range.elapsed_us() for event in profiler.events() if SPIN in event.name)
    return times[len(times) // 2] * 1e-6 if times else None


def cpu_operators(call: Callable[[], Any]) -> list[str]:
    """The operators that took at least a tenth of a call's time on the CPU, longest first."""
    make_ready(call)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    averages = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in averages) or 1
    heavy = [event for event in averages if event.self_cpu_time_total >= total / 10]
    return [event.key for event in sorted(heavy, key=lambda event: -event.self_cpu_time_total)]


def kernel_names(call: Callable[[], Any], device: str) -> list[str]:
    """The names of what a call runs: on a GPU every kernel once, longest first; on a CPU the heaviest operators."""
    if device == "cpu":
        return cpu_operators(call)
    seconds: dict[str, float] = {}
    for operations in device_operations(call):
        for operation in operations:
            seconds[operation.name] = seconds.get(operation.name, 0.0) + operation.stop - operation.start
    return [short(name) for name in sorted(seconds, key=lambda name: -seconds[name])]


def short(name: str) -> str:
    """A demangled name without its return type and its last argument list, which repeats the template's arguments."""
    depth, end = 0, len(name)
    if name.endswith(")"):
        for position in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[position], 0)
            if depth == 0:
                end = position
                break
    return name[: end or len(name)].removeprefix("void ")


def chosen(kernels: list[str]) -> str:
    """The family of fused attention among some kernels, e.g. "cudnn"; "unfused" if there is none; "" without kernels."""
    for part, family in FAMILIES:
        if any(part in kernel for kernel in kernels):
            return family
    return "unfused" if kernels else ""
