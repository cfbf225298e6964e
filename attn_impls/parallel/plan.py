"""What a strategy gives the harness: forms, and for each a plan of what one rank does with one workload.

Plans deal in plain tensors, and say which part of the unsharded answer theirs is; the harness knows what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..registry import Implementation, Kernel
from ..workload import Workload

Share = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k and v of a chunk, in the implementation's layout


@dataclass(frozen=True)
class Spread:
    """One workload on `size` ranks, seen from one of them, as a plan is given it."""

    workload: Workload
    implementation: Implementation
    device: str
    rank: int
    size: int
    build: Callable[[Workload], Kernel]  # the implementation's kernel for what a rank computes
    pad_heads: bool = False
    overlap_chunks: tuple[int, ...] = (1,)
    overlap_along: str = "auto"  # "heads" or "rows"; "auto": what the layout suggests
    overlap_streams: tuple[int, ...] = (2, 2)  # that compute, and that copy
    seed: int = 0

    @property
    def layout(self) -> str:
        return self.implementation.layout


class Traffic(NamedTuple):
    """A collective and its bytes: what a rank gives to an all_gather, or the buffer that is reduced."""

    collective: str  # "all_gather", "all_reduce" or "reduce_scatter"
    bytes: int
    overlapped: bool = False
    group: dist.ProcessGroup | None = None  # None: all ranks


class Holding(NamedTuple):
    """Which part of the unsharded answer a rank's result is."""

    heads: list[int]  # the query heads, in the result's order
    rows: range  # of the queries
    weight: torch.Tensor | None = None  # [H·DV, E]: the result is all heads side by side times this


class Graph(NamedTuple):
    """A forward pass that waits for its backward pass: the share it started from, and the kernel's output."""

    leaves: Share
    out: torch.Tensor


class Gradients(NamedTuple):
    """Of a rank's q, k and v, in the implementation's layout, and of its rows of the projection, [h·DV, E]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor | None = None


class Plan:
    """One rank's part of a workload. Its constructor builds the kernels, alone: it must not communicate.

    Raises Unsupported where the workload cannot be spread so.
    """

    bound = 1.0  # the highest efficiency that the split allows, communication aside
    rehearses = True  # `rehearse` makes the first call of each kernel
    kernels: list[Kernel]  # one a chunk
    locals: list[Workload]  # what each of them computes

    def __init__(self, spread: Spread):
        self.spread = spread

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide what this plan does, by their names, as flat JSON; of pad_heads, whether it had to pad."""
        return {"pad_heads": self.bound < 1}

    def rehearse(self, share: list[Share]) -> None:
        """Compile and call the kernels, alone, before anybody waits for them."""
        self.silent(share)

    def connect(self) -> None:
        """Make the process groups that the plan needs; all ranks call it together."""

    def share(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Share]:
        """This rank's part of the workload's q, k, v ("bhsd"), in the implementation's layout, chunk by chunk."""
        raise NotImplementedError

    def __call__(self, share: list[Share]) -> torch.Tensor:
        """What is timed."""
        raise NotImplementedError

    def silent(self, share: list[Share]) -> torch.Tensor:
        """The communication-free twin: the same computation, nothing sent."""
        raise NotImplementedError

    def traffic(self, direction: str = "forward") -> tuple[Traffic, ...]:
        """What the form sends in a direction, "forward" or "backward"; empty where it sends nothing."""
        raise NotImplementedError

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        """A result as [B, heads or 1, rows, D], the shape in which `holding` describes it."""
        raise NotImplementedError

    @property
    def holding(self) -> Holding:
        """What this rank's result is, padding left out."""
        raise NotImplementedError

    @property
    def heads(self) -> list[int]:
        """The query heads whose dq this rank makes, -1 for padding."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> list[int]:
        """The KV heads whose dk and dv this rank makes, -1 for padding."""
        raise NotImplementedError

    def upstream(self, dout: torch.Tensor) -> torch.Tensor:
        """What the backward pass receives on this rank, of the gradient [B, H, Sq, DV] of the unsharded output.

        Of a projected output, the gradient is that with its heads side by side, [B, Sq, E].
        """
        raise NotImplementedError

    def forward(self, share: list[Share]) -> Graph:
        """A forward pass with its graph, nothing sent. Raises Unsupported where the form has no backward of its own."""
        raise NotImplementedError

    def backward(self, graph: Graph, upstream: torch.Tensor, silent: bool = False) -> Gradients:
        """What is timed as the backward pass; uses the graph up. silent: the same computation, nothing sent."""
        raise NotImplementedError


class Form(NamedTuple):
    """A part of a strategy that is timed apart."""

    name: str
    plan: type[Plan]
    strategy: str = "tensor"
