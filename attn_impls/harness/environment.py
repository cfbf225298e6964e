"""The machine a run stands on: what is stored with the results, and what a reader wants above the table."""

from __future__ import annotations

import contextlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..registry import Implementation

# what names the host, or changes from run to run: pytest-benchmark would store it and then warn that it differs
VOLATILE = ("node", "release")
VOLATILE_CPU = ("hz_actual", "hz_actual_friendly", "flags")


def update_machine_info(info: dict[str, Any], device: str, implementations: list[Implementation]) -> None:
    """Make pytest-benchmark's machine_info say which GPU, driver and libraries gave the numbers, and no host name."""
    for key in VOLATILE:
        info.pop(key, None)
    for key in VOLATILE_CPU:
        info.get("cpu", {}).pop(key, None)
    info.update(machine(device), libraries=libraries(implementations))


def machine(device: str) -> dict[str, Any]:
    """Stable facts: the same on every run of one installation."""
    facts: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "gpu": None,
        "gpu_count": 0,
        "driver": None,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_count": torch.cuda.device_count(),
            "cudnn": torch.backends.cudnn.version(),
            "driver": _nvml_facts().get("driver"),
        }
        del facts["threads"]
    return facts


def libraries(implementations: list[Implementation]) -> dict[str, str]:
    """The version of each installed library that an implementation needs, by distribution."""
    return {i.dist: i.version for i in implementations if i.dist}


def state(device: str) -> dict[str, Any]:
    """What changes from run to run: clocks, power, ECC, what else is on the card. Empty on a CPU."""
    return {k: v for k, v in _nvml_facts().items() if k != "driver"} if device == "cuda" else {}


def describe(info: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """The machine in a few lines, from a JSON file's machine_info and the session's state."""
    if info.get("gpu"):
        count = f"{info['gpu_count']} × " if info["gpu_count"] > 1 else ""
        lines = [f"{count}{info['gpu']} · driver {info['driver']} · CUDA {info['cuda']} · cuDNN {info['cudnn']}"]
    else:
        brand = info.get("cpu", {}).get("brand_raw") or info.get("machine", "CPU")
        lines = [f"CPU: {brand} · torch threads: {info.get('threads')}"]
    versions = {"torch": info.get("torch"), "triton": info.get("triton"), **info.get("libraries", {})}
    lines.append(" · ".join(f"{name} {version}" for name, version in versions.items() if version))
    if state:
        power = f"power cap {state['power_cap_w']:.0f} W" if state.get("power_cap_w") else "power cap unknown"
        ecc = {True: "ECC on", False: "ECC off", None: "ECC unknown"}[state.get("ecc")]
        others = state.get("other_processes")
        busy = "other processes unknown" if others is None else f"{others} other process{'es' * (others != 1)} on the card"
        clock = f"SM clock now {state.get('sm_mhz') or '?'} of at most {state.get('max_sm_mhz') or '?'} MHz"
        lines.append(f"{clock} · {power} · {ecc} · {busy}")
    return lines


def same_device(one: dict[str, Any], other: dict[str, Any]) -> str:
    """ "" if the numbers of two machine_infos may be compared, else the difference in words."""
    ours, theirs = (i.get("gpu") or i.get("cpu", {}).get("brand_raw", "an unknown CPU") for i in (one, other))
    return "" if ours == theirs else f"this run is on {ours}, that one was on {theirs}"


def device_bytes(device: str) -> int:
    """All memory of the device, used or not."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may have less; "max" is no number
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


_max_sm_mhz = 0.0


def max_sm_mhz() -> float:
    """The highest SM clock of the current device, 0 where NVML does not tell; asked until it does."""
    global _max_sm_mhz
    _max_sm_mhz = _max_sm_mhz or _nvml_facts().get("max_sm_mhz") or 0.0
    return _max_sm_mhz


def nvml_device(device: int) -> tuple[Any, Any] | None:
    """pynvml, initialised, and its handle of a CUDA device; None where NVML is missing or does not know it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # by UUID: CUDA_VISIBLE_DEVICES renumbers the devices for CUDA, not for NVML
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except Exception:  # no driver, or a container that hides it: the numbers stand without it
        return None


def _nvml_facts() -> dict[str, Any]:
    """NVML's view of the current device; {} where NVML is missing, None for each thing it does not tell."""
    found = nvml_device(torch.cuda.current_device())
    if found is None:
        return {}
    pynvml, handle = found

    def ask(function: str, *arguments: Any) -> Any:
        with contextlib.suppress(pynvml.NVMLError):
            return getattr(pynvml, function)(*arguments)
        return None

    driver, ecc = ask("nvmlSystemGetDriverVersion"), ask("nvmlDeviceGetEccMode", handle)
    power = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    processes = ask("nvmlDeviceGetComputeRunningProcesses", handle)
    return {
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "sm_mhz": ask("nvmlDeviceGetClockInfo", handle, pynvml.NVML_CLOCK_SM),
        "max_sm_mhz": ask("nvmlDeviceGetMaxClockInfo", handle, pynvml.NVML_CLOCK_SM),
        "power_cap_w": power and power / 1000,
        "ecc": ecc and bool(ecc[0]),
        "other_processes": None if processes is None else sum(p.pid != os.getpid() for p in processes),
    }


def _version(dist: str) -> str | None:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return None
