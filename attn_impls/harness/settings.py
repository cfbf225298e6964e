"""Torch's global settings: an implementation that leaves one changed changes what everybody else is timed and judged with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

cuda = torch.backends.cuda


class Precision(NamedTuple):
    """Of float32 matmuls: by the older call, None once the newer one is mixed in; by the newer one, on GPUs and on CPUs."""

    older: str | None
    newer: tuple[str, ...]

    def __str__(self) -> str:
        return self.older or "/".join(self.newer)


def _backends() -> list[Any]:
    """What the newer call sets, of torch 2.9 and later, the general first: the others inherit it."""
    found = (torch.backends, torch.backends.mkldnn, cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [one for one in found if hasattr(one, "fp32_precision")]


def _precision() -> Precision:
    newer = tuple(backend.fp32_precision for backend in _backends())
    try:
        return Precision(torch.get_float32_matmul_precision(), newer)
    except RuntimeError:
        return Precision(None, newer)


def _set_precision(before: Precision) -> None:
    if before.older:
        torch.set_float32_matmul_precision(before.older)
    for backend, precision in zip(_backends(), before.newer, strict=True):
        backend.fp32_precision = precision


class Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _set_default_device(before: torch.device) -> None:
    torch.set_default_device(None if before.type == "cpu" else before)  # a device that is named costs every call of torch


def _on_cuda(read: Callable[[], Any]) -> Callable[[], Any]:
    """None before CUDA is used, to begin with which is no change, and where it is broken."""

    def reading() -> Any:
        try:
            return read() if torch.cuda.is_initialized() else None
        except RuntimeError:
            return None

    return reading


SETTINGS = {
    "whether gradients are recorded": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "the precision of float32 matmuls": Setting(_precision, _set_precision),
    "the deterministic mode": Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "the default device": Setting(torch.get_default_device, _set_default_device),
    "whether autograd looks for anomalies": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "autocast on GPUs": Setting(partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")),
    "autocast on CPUs": Setting(partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    "the current CUDA device": Setting(_on_cuda(torch.cuda.current_device), torch.cuda.set_device),
    "the current CUDA stream": Setting(_on_cuda(torch.cuda.current_stream), torch.cuda.set_stream),
    "the number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "the seed of random numbers": Setting(torch.initial_seed, torch.manual_seed),
    "SDPA's flash backend": Setting(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "SDPA's memory-efficient backend": Setting(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "SDPA's math backend": Setting(cuda.math_sdp_enabled, cuda.enable_math_sdp),
    "SDPA's cuDNN backend": Setting(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
}


def current() -> dict[str, Any]:
    return {name: setting.read() for name, setting in SETTINGS.items()}


def restore(before: dict[str, Any]) -> str:
    """Set what has changed back; the first such change in words, "" if there is none."""
    now = current()
    changes = {name: now[name] for name in SETTINGS if None not in (now[name], before[name]) and now[name] != before[name]}
    for name in changes:
        SETTINGS[name].write(before[name])
    return next((f"{name} ({before[name]} → {value})" for name, value in changes.items()), "")
