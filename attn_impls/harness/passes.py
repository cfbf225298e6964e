"""Backward passes as calls that can be timed alone: the forward passes they start from are made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..parallel.plan import Graph, Share
from ..registry import Kernel


class BackwardPass:
    """The gradient kernels alone. `renew` makes forward passes, untimed, and each call uses one up.

    A graph is not kept for a second backward: compiled ones may reuse its memory.
    """

    def __init__(self, forward: Callable[[], Graph], backward: Callable[[Graph], Any]):
        self.forward, self.backward = forward, backward
        self.graphs: list[Graph] = []

    def renew(self, calls: int) -> None:
        self.graphs = []  # what a late round left, before there is more
        self.graphs = [self.forward() for _ in range(calls)]

    def __call__(self) -> Any:
        return self.backward(self.graphs.pop())


def of_kernel(kernel: Kernel, share: Share, upstream: torch.Tensor) -> BackwardPass:
    """The backward pass of a kernel on q, k, v and the gradient of its output, all in its layout."""

    def forward() -> Graph:
        q, k, v = (tensor.detach().requires_grad_() for tensor in share)
        return Graph((q, k, v), kernel(q, k, v))

    return BackwardPass(forward, lambda graph: torch.autograd.grad(graph.out, graph.leaves, upstream))
