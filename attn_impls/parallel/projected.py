"""Tensor parallelism with the output projection behind attention, its rows split like the heads (Megatron-LM).

project: the ranks' partial products are summed on all ranks. project-scatter: the sum's rows are left scattered (sequence
parallelism: Korthikanti et al., 2022, arXiv 2205.05198).

Backward: the gradient of the projected output is the same on every rank behind the all-reduce, so nothing is sent; behind the
reduce-scatter each rank has its rows of it, which are gathered. Either way dW and the gradient of the heads are local.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..registry import Unsupported
from .collectives import all_gather, reduce_scatter
from .plan import Form, Gradients, Graph, Holding, Share, Spread, Traffic
from .tensor import Core, pick


class Project(Core):
    """The output projection; the ranks' partial products are summed on all ranks."""

    def __init__(self, spread: Spread):
        super().__init__(spread)
        self.embed = spread.workload.heads * spread.workload.v_head_dim
        per_head = self.whole_weight()[None].unflatten(1, (spread.workload.heads, -1))  # [1, H, DV, E]
        self.weight = pick(per_head, self.heads)[0].flatten(0, 1)  # [h·DV, E]

    def whole_weight(self) -> torch.Tensor:
        """W [H·DV, E] with E = H·DV, the same on every rank; entries of variance 1/E."""
        generator = torch.Generator(self.spread.device).manual_seed(self.spread.seed + 2)
        weight = torch.randn(self.embed, self.embed, generator=generator, device=self.spread.device)
        return (weight * self.embed**-0.5).to(self.spread.workload.dtype)

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """A kernel's output as rows of its heads side by side, [B·S, h·DV]."""
        bshd = out.transpose(1, 2) if self.head_dim == 1 else out
        return bshd.reshape(-1, self.weight.shape[0])

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` undone: [B·S, h·DV] as the kernel's output, contiguous in its layout."""
        w = self.locals[0]
        bshd = rows.view(w.batch, w.q_len, w.heads, w.v_head_dim)
        return (bshd.transpose(1, 2) if self.head_dim == 1 else bshd).contiguous()

    def silent(self, share: list[Share]) -> torch.Tensor:
        return self.rows(self.attend(share)[0]) @ self.weight

    def __call__(self, share: list[Share]) -> torch.Tensor:
        partial = self.silent(share)
        self.sum(partial)
        return partial

    def sum(self, partial: torch.Tensor) -> None:
        dist.all_reduce(partial)

    def traffic(self, direction: str = "forward") -> tuple[Traffic, ...]:
        if direction == "backward":
            return super().traffic(direction)
        w = self.spread.workload
        return (Traffic("all_reduce", w.batch * w.q_len * self.embed * w.dtype.itemsize),)

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return out.view(self.spread.workload.batch, 1, -1, self.embed)

    @property
    def holding(self) -> Holding:
        w = self.spread.workload
        return Holding(list(range(w.heads)), range(w.q_len), self.whole_weight())

    def upstream(self, dout: torch.Tensor) -> torch.Tensor:
        """[B·S, E]."""
        return dout.transpose(1, 2).reshape(-1, self.embed)

    def backward(self, graph: Graph, upstream: torch.Tensor, silent: bool = False) -> Gradients:
        whole = self.collect(upstream, silent)
        into_heads = super().backward(graph, self.from_rows(whole @ self.weight.T), silent)
        return into_heads._replace(weight=self.rows(graph.out.detach()).T @ whole)

    def collect(self, upstream: torch.Tensor, silent: bool) -> torch.Tensor:  # noqa: ARG002  (one signature for both forms)
        """The gradient of all rows of the projected output, in the order of `rows`."""
        return upstream


class ProjectScatter(Project):
    """The projection, with rank r keeping the r-th part of the sequence."""

    def __init__(self, spread: Spread):
        if spread.workload.q_len % spread.size:
            raise Unsupported(f"q_len ({spread.workload.q_len}) is not divisible by the {spread.size} ranks")
        super().__init__(spread)
        self.stand_in: torch.Tensor | None = None  # for what the silent twin does not gather

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """[N·B·S/N, h·DV]: the rows of rank 0's part of the sequence first, for every batch."""
        bshd = out.transpose(1, 2) if self.head_dim == 1 else out
        return bshd.unflatten(1, (self.spread.size, -1)).transpose(0, 1).reshape(-1, self.weight.shape[0])

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        by_batch = rows.view(self.spread.size, self.spread.workload.batch, -1, self.weight.shape[0]).transpose(0, 1)
        return super().from_rows(by_batch.reshape(-1, self.weight.shape[0]))

    def __call__(self, share: list[Share]) -> torch.Tensor:
        partial = self.silent(share)
        mine = partial.new_empty(len(partial) // self.spread.size, self.embed)
        reduce_scatter(mine, partial)
        return mine

    def traffic(self, direction: str = "forward") -> tuple[Traffic, ...]:
        if direction == "forward":
            return (super().traffic()[0]._replace(collective="reduce_scatter"),)
        w = self.spread.workload
        mine = w.batch * w.q_len * self.embed * w.dtype.itemsize // self.spread.size
        return (Traffic("all_gather", mine), *super().traffic(direction))

    @property
    def holding(self) -> Holding:
        length = self.spread.workload.q_len // self.spread.size
        return super().holding._replace(rows=range(self.spread.rank * length, (self.spread.rank + 1) * length))

    def upstream(self, dout: torch.Tensor) -> torch.Tensor:
        """[B·S/N, E]: of this rank's part of the sequence."""
        rows = self.holding.rows
        return super().upstream(dout[:, :, rows.start : rows.stop])

    def collect(self, upstream: torch.Tensor, silent: bool) -> torch.Tensor:
        if silent:
            self.stand_in = upstream.repeat(self.spread.size, 1) if self.stand_in is None else self.stand_in
            return self.stand_in
        whole = upstream.new_empty(self.spread.size * len(upstream), self.embed)
        all_gather(whole, upstream).wait()
        return whole


FORMS = (Form("project", Project), Form("project-scatter", ProjectScatter))
