"""What a strategy gives the harness: forms, and for each a plan of what one rank does with one workload."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..registry import Implementation, Kernel
from ..workload import Workload

if TYPE_CHECKING:  # the harness imports the strategies
    from ..harness.inputs import Inputs
    from ..harness.oracle import Reference


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
    seed: int = 0

    @property
    def layout(self) -> str:
        return self.implementation.layout


class Traffic(NamedTuple):
    """The collective of a form and its bytes: what a rank gives to an all_gather, or the buffer that is reduced."""

    collective: str  # "all_gather", "all_reduce" or "reduce_scatter"
    bytes: int
    overlapped: bool = False


class Plan:
    """One rank's part of a workload. Its constructor builds the kernels, alone: it must not communicate.

    Raises Unsupported where the workload cannot be spread so.
    """

    bound = 1.0  # the highest efficiency that the split allows, communication aside

    def __init__(self, spread: Spread):
        self.spread = spread

    def rehearse(self, share: list[Inputs]) -> None:
        """Compile and call the kernels, alone, before anybody waits for them."""
        self.silent(share)

    def connect(self) -> None:
        """Make the process groups that the plan needs; all ranks call it together."""

    def share(self, inputs: Inputs) -> list[Inputs]:
        """This rank's part of the workload's q, k, v ("bhsd"), in the implementation's layout, chunk by chunk."""
        raise NotImplementedError

    def __call__(self, share: list[Inputs]) -> torch.Tensor:
        """What is timed."""
        raise NotImplementedError

    def silent(self, share: list[Inputs]) -> torch.Tensor:
        """The communication-free twin: the same computation, nothing sent."""
        raise NotImplementedError

    def traffic(self) -> Traffic | None:
        """What the form sends; None where it sends nothing."""
        return None

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        """A result as [B, heads or 1, rows, D], the shape in which `answer` knows it."""
        raise NotImplementedError

    def answer(self, reference: Reference, inputs: Inputs) -> Reference:
        """What this rank must return, from the unsharded answer to the unsharded inputs."""
        raise NotImplementedError


class Form(NamedTuple):
    """A part of a strategy that is timed apart."""

    name: str
    plan: type[Plan]
    strategy: str = "tensor"


def only_heads(reference: Reference, heads: list[int]) -> Reference:
    """The answer for some heads."""
    parts = {name: getattr(reference, name)[:, heads] for name in ("out", "norm", "budget")}
    return dataclasses.replace(reference, **parts)
