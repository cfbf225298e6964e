"""The table of implementations: how one registers, how they are found, and why one is unavailable."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .workload import Workload

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LseKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
LAYOUTS = ("bhsd", "bshd")
DEVICES = ("cuda", "cpu")
ENTRY_POINTS = "attn_impls"
PRECISIONS = ("int8", "fp8")  # classes of approximate kernels


class Unsupported(Exception):
    """This implementation cannot do this workload: raised by its builder, or by the first call of the kernel, where that
    compiles. It becomes a skip with the reason."""


@dataclass(eq=False)
class Implementation:
    """A registered builder. Calling it with a workload returns the kernel, `kernel(q, k, v) -> out`."""

    name: str
    build: Callable[[Workload], Kernel]
    dists: tuple[str, ...] = ()
    layout: str = "bhsd"
    devices: tuple[str, ...] = ("cuda", "cpu")
    backward: bool = True
    approximate: bool | str = False
    dispatches: bool = False
    concurrent: bool = True
    compiles: str = ""
    install: str = ""
    source: str = ""
    broken: str = ""  # why a package that should have registered this could not
    lse_builder: Callable[[Workload], LseKernel] | None = field(default=None, repr=False)

    def __call__(self, w: Workload) -> Kernel:
        return self.build(w)

    def with_lse(self, builder: Callable[[Workload], LseKernel]) -> Callable[[Workload], LseKernel]:
        """Decorator for a second builder, whose kernel returns (out, lse); lse [B, H, S] float32, natural log."""
        self.lse_builder = builder
        return builder

    @property
    def dist(self) -> str:
        """The installed distribution that provides the library, "" if none is or none is needed."""
        return next((dist for dist in self.dists if _version(dist)), "")

    @property
    def version(self) -> str:
        """The library's version as its metadata gives it; torch's for implementations that need nothing else."""
        return _version(self.dist) if self.dists else torch.__version__

    @property
    def how_to_install(self) -> str:
        return self.install or f"pip install {self.dists[0]}"

    def unavailable(self, device: str) -> str:
        """Why nothing of this implementation can run on a device type ("cuda", "cpu"), or "" if it can be tried."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only; this run is on {device}"
        if self.dists and not self.dist:
            return f"not installed: {self.how_to_install}"
        return ""


REGISTRY: dict[str, Implementation] = {}


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A [B, H, S, D] tensor, contiguous in a layout of LAYOUTS; its own memory where that is so already."""
    return (tensor if layout == "bhsd" else tensor.transpose(1, 2)).contiguous()


def as_bhsd(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A [B, H, S, D] view of a tensor in a layout of LAYOUTS."""
    return tensor if layout == "bhsd" else tensor.transpose(1, 2)


def attention(
    name: str,
    *,
    dist: str | Iterable[str] = "",
    layout: str = "bhsd",
    devices: tuple[str, ...] = ("cuda", "cpu"),
    backward: bool = True,
    approximate: bool | str = False,
    dispatches: bool = False,
    concurrent: bool = True,
    compiles: str = "",
    install: str = "",
) -> Callable[[Callable[[Workload], Kernel]], Implementation]:
    """Register the decorated builder as the implementation `name`.

    dist: the distribution whose metadata says whether the library is installed, and its version; with several, any one
    of them will do. layout: of q, k, v and out, "bhsd" or "bshd". devices: types it runs on. backward: whether
    autograd works. approximate: low precision inside, marked so and judged by the budget of its own class: "int8" (q·kᵀ of
    int8, p·v of fp16), "fp8" (both of fp8), or True for the looser of them. dispatches: the library chooses among kernels, so
    what it chose is shown. concurrent: whether several of its kernels may run at once, on streams of their own. compiles: how
    long for each kind of workload, "seconds" or "minutes", if it shows: tests on workloads that are not timed are `slow` then,
    and where it takes minutes a benchmark builds nothing but its case. install: one line that says how to get it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"implementation {name!r}: layout is {layout!r}, give one of {', '.join(LAYOUTS)}")
    if not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(".py"):
        raise ValueError(f"implementation name {name!r}: use letters, digits, '_', '-' and '.'")
    if not set(devices) <= set(DEVICES) or isinstance(devices, str):
        raise ValueError(f"implementation {name!r}: devices is {devices!r}, give a tuple of {', '.join(DEVICES)}")
    if compiles not in ("", "seconds", "minutes"):
        raise ValueError(f"implementation {name!r}: compiles is {compiles!r}, give 'seconds', 'minutes' or ''")
    if approximate not in (False, True, *PRECISIONS):
        raise ValueError(f"implementation {name!r}: approximate is {approximate!r}, give True, {', '.join(PRECISIONS)} or False")
    dists = (dist,) if isinstance(dist, str) and dist else tuple(dist)

    def register(build: Callable[[Workload], Kernel]) -> Implementation:
        source = inspect.getsourcefile(build) or ""
        if name in REGISTRY:
            raise ValueError(f"implementation {name!r} is registered twice: in {REGISTRY[name].source} and in {source}")
        REGISTRY[name] = Implementation(
            name,
            build,
            dists=dists,
            layout=layout,
            devices=tuple(devices),
            backward=backward,
            approximate=approximate,
            dispatches=dispatches,
            concurrent=concurrent,
            compiles=compiles,
            install=install,
            source=source,
        )
        return REGISTRY[name]

    return register


def discover() -> dict[str, Implementation]:
    """Import every implementation of this package and of installed packages (entry-point group "attn_impls")."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        before = set(REGISTRY)
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # somebody else's package: it must cost its own cases only, and loudly
            for added in set(REGISTRY) - before:
                del REGISTRY[added]
            reason = f"entry point {entry.name!r} ({entry.value}) does not load: {one_line(error)}"
            if entry.name not in before:
                _register_broken(entry.name, reason)
            elif not REGISTRY[entry.name].broken:
                warnings.warn(f"{reason}; its name is taken", stacklevel=2)
    return REGISTRY


def load_file(path: str | Path) -> list[Implementation]:
    """Import a Python file and return the implementations it registers. Raises ValueError with one line."""
    path = Path(path)
    known = [i for i in REGISTRY.values() if i.source and Path(i.source).resolve() == path.resolve()]
    if known:
        return known
    if not path.is_file():
        raise ValueError(f"implementation file {str(path)!r} does not exist")
    before = set(REGISTRY)
    name = f"attn_impls_file_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"implementation file {str(path)!r} is not a Python file: give one that ends in .py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit, and pytest's outcomes, among them
        for partial in set(REGISTRY) - before:
            del REGISTRY[partial]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"implementation file {str(path)!r} does not import: {one_line(error)}") from error
    added = [REGISTRY[name] for name in REGISTRY if name not in before]
    if not added:
        raise ValueError(f'implementation file {str(path)!r} registers nothing: decorate a builder with @attention("name")')
    return added


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()}" if text else type(error).__name__


def _register_broken(name: str, reason: str) -> None:
    def build(_: Workload) -> Any:
        raise ImportError(reason)

    attention(name)(build).broken = reason


def _version(dist: str) -> str:
    try:
        return metadata.version(dist) if dist else ""
    except metadata.PackageNotFoundError:
        return ""
