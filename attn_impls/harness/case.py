"""One implementation on one workload: building its kernel, calling it, and turning whatever goes wrong into one message."""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..registry import Implementation, Kernel, Unsupported, one_line
from ..workload import Workload
from . import settings
from .inputs import Inputs

HARNESS = Path(__file__).parent
KEPT_SHARE = 0.05  # of the device's memory, which torch may keep between cases
REGISTRY_FILE = inspect.getsourcefile(Implementation)


class CaseFailed(Exception):
    """This case failed, with a message that a person can act on. Carries no frames, so tensors die with their case."""


class OutOfMemory(CaseFailed):
    """The device has less memory than this case takes."""


class Broken(CaseFailed):
    """The library is installed and does not work: every case of this implementation fails alike."""


class DeviceLost(CaseFailed):
    """A sticky CUDA error: nothing can run on this device in this process any more."""


@dataclass(frozen=True)
class Case:
    """An implementation on a workload, on a type of device, in one direction (of DIRECTIONS)."""

    workload: Workload
    implementation: Implementation
    device: str
    direction: str = "forward"

    def __str__(self) -> str:
        return f"{self.workload}-{self.implementation.name}"

    @property
    def group(self) -> str:
        return group(self.workload, self.direction)


def group(workload: Workload | str, direction: str) -> str:
    """What cases to be compared with one another share: the workload, and the direction if it is not forward."""
    return str(workload) if direction == "forward" else f"{workload} {direction}"


def direction_of(item: Any) -> str:
    """The direction that a test over cases (pytest's item) is marked with."""
    marker = item.get_closest_marker("direction")
    return marker.args[0] if marker else "forward"


def ungrouped(name: str) -> tuple[str, str]:
    """The workload and the direction of a group."""
    workload, _, direction = name.partition(" ")
    return workload, direction or "forward"


class Built(NamedTuple):
    """A case's kernel after its first call."""

    kernel: Kernel
    seconds: float  # that the builder and that call took, compilation included
    out: torch.Tensor  # a copy of that call's output, in the kernel's layout


def build(case: Case, inputs: Inputs) -> Built:
    """Build the case's kernel and call it once, on inputs in its layout.

    Raises Unsupported where the builder, or that first call, says it cannot do the workload, CaseFailed otherwise.
    """
    started = time.perf_counter()
    with guard(case, "builder"), torch.device(case.device):
        kernel = case.implementation(case.workload)
    if not callable(kernel):
        raise CaseFailed(f"{case.implementation.name}: its builder returned {kernel!r}, not a kernel(q, k, v)")
    out = call(case, kernel, inputs, first=True)
    return Built(kernel, time.perf_counter() - started, out.detach().clone())


def call(case: Case, kernel: Kernel, inputs: Inputs, first: bool = False) -> torch.Tensor:
    """One synchronised call of the kernel on tensors in its layout. Raises CaseFailed on anything but a fit output.

    first: it may raise Unsupported, since what compiles in its first call learns there that it cannot.
    """
    with guard(case, "kernel", allowed=first):
        out = kernel(*inputs)
        if case.device == "cuda":
            torch.cuda.synchronize()
    validate(case, out)
    return out


def evaluating(case: Case) -> contextlib.AbstractContextManager[object]:
    """Without gradients, as evaluations are: often other code. What compiles is left alone: some of it compiles anew for that."""
    return contextlib.nullcontext() if case.implementation.compiles else torch.no_grad()


def validate(case: Case, out: object) -> None:
    """Raise CaseFailed unless `out` has q's layout and the workload's shape, dtype and device."""
    name, w = case.implementation.name, case.workload
    if not isinstance(out, torch.Tensor):
        raise CaseFailed(f"{name} returned {type(out).__name__}, not a tensor")
    if out.layout != torch.strided:
        raise CaseFailed(f"{name} returned a tensor of {out.layout}, expected a dense one")
    expected = (w.shapes(case.implementation.layout)["out"], w.dtype, case.device)
    found = (tuple(out.shape), out.dtype, out.device.type)
    for what, want, got in zip(("shape", "dtype", "device"), expected, found, strict=True):
        if want != got:
            raise CaseFailed(f"{name} returned {what} {got}, expected {want} (layout {case.implementation.layout!r})")


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What torch's allocator says, without its advice: "tried to allocate 64.00 GiB, of 79.18 GiB 2.71 GiB were free"."""
    told = re.search(
        r"Tried to allocate (.+?)\. GPU \d+ has a total capacity of (.+?) of which (.+?) is free(?:\. (.+?) allowed)?", str(error)
    )
    if not told:
        return one_line(error)
    size, total, free, allowed = told.groups()
    return f"tried to allocate {size}, of {total} {free} were free{f' and {allowed} allowed' if allowed else ''}"


@contextlib.contextmanager
def guard(case: Case, stage: str, allowed: bool = False) -> Iterator[None]:
    """Turn an exception of the implementation into CaseFailed, with its memory freed; likewise a setting of torch's that it
    leaves changed, which is set back. allowed: Unsupported passes."""
    before = settings.current()
    try:
        try:
            yield
        finally:
            changed = settings.restore(before)
        if changed:
            raise CaseFailed(f"{case.implementation.name} changed {changed} for everybody in its {stage}: set it back there")
    except CaseFailed:
        raise
    except Unsupported as error:
        lost = case.device == "cuda" and _device_lost()
        if (stage == "builder" or allowed) and not lost:
            raise
        failure = _failure(case, stage, error) if lost else too_late(case, error)
        forget(error)
    except (Exception, SystemExit) as error:
        failure = _failure(case, stage, error)
        forget(error)
    else:
        return
    release(case.device, failure)
    raise failure


def too_late(case: Case, error: Unsupported) -> CaseFailed:
    """What Unsupported is after a kernel's first call: else a kernel could choose what it is judged on."""
    said = str(error).partition("\n")[0]
    return CaseFailed(
        f"{case.implementation.name}: only a builder or a first call may raise Unsupported, not a later one: {said}"
    )


def forget(error: BaseException | None) -> None:
    """Let go of the tensors in an exception's frames, and in those of the exceptions behind it."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def release(device: str, failure: CaseFailed | None = None) -> None:
    """Give the memory of a finished case back to the device where it is much; after a failure, what its frames' cycles hold too.

    The little that torch keeps saves the next case from asking the driver for it again.
    """
    if failure:
        gc.collect()
    if device == "cuda" and not isinstance(failure, DeviceLost):
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if failure or idle > KEPT_SHARE * torch.cuda.mem_get_info()[1]:
            torch.cuda.empty_cache()


def _failure(case: Case, stage: str, error: BaseException) -> CaseFailed:
    implementation = case.implementation
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(f"{implementation.name} ran out of memory in its {stage}: {out_of_memory(error)}")
    where = "".join(traceback.format_list(_own_frames(error)))
    if case.device == "cuda" and _device_lost():
        return DeviceLost(f"{implementation.name} broke the CUDA context in its {stage}: {one_line(error)}\n{where}")
    if stage == "builder" and implementation.dists and isinstance(error, (ImportError, OSError, AttributeError)):
        library = f"{implementation.dist} {implementation.version}"
        return Broken(
            f"{implementation.name} is installed but broken ({library}): {one_line(error)}\n{where}"
            f"reinstall it ({implementation.how_to_install}), or leave it out with --impl"
        )
    return CaseFailed(f"{implementation.name} raised in its {stage}: {one_line(error)}\n{where}{_rest(error)}")


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames below this package's machinery: the implementation's own and its library's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [n for n, frame in enumerate(frames) if Path(frame.filename).parent == HARNESS or frame.filename == REGISTRY_FILE]
    return frames[max(ours, default=-1) + 1 :][-6:]


def _rest(error: BaseException) -> str:
    """What an exception says after its first line, the middle left out where it is long."""
    lines = str(error).strip().splitlines()[1:]
    if len(lines) > 10:
        lines = [*lines[:3], f"… {len(lines) - 8} more lines …", *lines[-5:]]
    return "\n".join(lines)


def _device_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
