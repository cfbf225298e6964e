"""Tensor parallelism: heads split over ranks (Megatron-LM: Shoeybi et al., 2019, arXiv 1909.08053).

core: each rank's heads, nothing sent. gather: the output of all heads on every rank. gather-overlapped: the same in chunks,
one chunk on its way while the next is computed.

Backward: every rank holds the same gradient of what a gather gave it, as what follows is computed alike on all, so each
takes its heads' slice and nothing is sent (Megatron's gather operator; were the ranks' gradients different parts of a sum,
it would be a reduce-scatter). Where ranks share KV heads, their dk and dv are summed. What sums the gradient of the
layer's input over ranks is the QKV projection in front, which is no part of attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..registry import Kernel, Unsupported, in_layout
from .collectives import all_gather, neighbours
from .heads import partition
from .plan import Form, Gradients, Graph, Holding, Plan, Share, Spread, Traffic


def pick(tensor: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """Some heads of a [B, H, S, D] tensor, copied; zeros for head -1."""
    picked = tensor[:, [max(0, head) for head in heads]]
    for position, head in enumerate(heads):
        if head < 0:
            picked[:, position] = 0
    return picked


class Core(Plan):
    """Attention of this rank's heads; each rank keeps its own."""

    def __init__(self, spread: Spread):
        super().__init__(spread)
        self.partition = partition(spread.workload, spread.size, self.chunk_weights(), spread.pad_heads)
        self.bound = self.partition.bound
        self.head_dim = 1 if spread.layout == "bhsd" else 2  # the dimension of heads
        self.locals = self.chunk_workloads()
        self.kernels = self.build_kernels()
        self.kv_group: dist.ProcessGroup | None = None

    def chunk_weights(self) -> tuple[int, ...]:
        return (1,)

    def chunk_workloads(self) -> list[Any]:
        return [self.partition.local(chunk) for chunk in range(len(self.partition.chunks))]

    def build_kernels(self) -> list[Kernel]:
        """One a chunk; chunks of one size, which run one after another, have one together."""
        built = {w: self.spread.build(w) for w in dict.fromkeys(self.locals)}
        return [built[w] for w in self.locals]

    def connect(self) -> None:
        if self.partition.sharing > 1:
            self.kv_group = neighbours(self.spread.rank, self.spread.size, self.partition.sharing)

    def in_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """A [B, H, S, D] tensor, contiguous in the implementation's layout."""
        return in_layout(tensor, self.spread.layout)

    def share(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Share]:
        shares = []
        for chunk in range(len(self.partition.chunks)):
            heads = self.partition.query_heads(self.spread.rank, chunk)
            kv_heads = self.partition.kv_heads(self.spread.rank, chunk)
            mine = pick(q, heads), pick(k, kv_heads), pick(v, kv_heads)
            shares.append((self.in_layout(mine[0]), self.in_layout(mine[1]), self.in_layout(mine[2])))
        return shares

    def attend(self, share: list[Share]) -> list[torch.Tensor]:
        return [kernel(*tensors) for kernel, tensors in zip(self.kernels, share, strict=True)]

    def __call__(self, share: list[Share]) -> torch.Tensor:
        return self.attend(share)[0]

    def silent(self, share: list[Share]) -> torch.Tensor:
        return self.attend(share)[0]

    def bhsd(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.head_dim == 1 else out.transpose(1, 2)

    @property
    def heads(self) -> list[int]:
        return self.partition.all_query_heads(self.spread.rank)

    @property
    def kv_heads(self) -> list[int]:
        return self.partition.all_kv_heads(self.spread.rank)

    @property
    def holding(self) -> Holding:
        return Holding([head for head in self.heads if head >= 0], range(self.spread.workload.q_len))

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return self.bhsd(out)[:, [position for position, head in enumerate(self.heads) if head >= 0]]

    def traffic(self, direction: str = "forward") -> tuple[Traffic, ...]:
        """Forward nothing; backward the dk and the dv of KV heads that ranks share."""
        if direction == "forward" or self.partition.sharing == 1:
            return ()
        w = self.locals[0]
        return tuple(
            Traffic("all_reduce", w.batch * w.kv_heads * w.kv_len * dim * w.dtype.itemsize, group=self.kv_group)
            for dim in (w.head_dim, w.v_head_dim)
        )

    def upstream(self, dout: torch.Tensor) -> torch.Tensor:
        return self.in_layout(pick(dout, self.heads))

    def forward(self, share: list[Share]) -> Graph:
        if len(share) > 1:
            raise Unsupported("its backward pass is that of 'gather': there is nothing to overlap")
        q, k, v = (tensor.detach().requires_grad_() for tensor in share[0])
        (out,) = self.attend([(q, k, v)])
        return Graph((q, k, v), out)

    def backward(self, graph: Graph, upstream: torch.Tensor, silent: bool = False) -> Gradients:
        dq, dk, dv = torch.autograd.grad(graph.out, graph.leaves, upstream)
        if self.partition.sharing > 1 and not silent:
            dk, dv = self.sum_shared(dk, dv)
        return Gradients(dq, dk, dv)

    def sum_shared(self, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks that hold the same KV head each know the gradient of their own queries only: add them up."""
        assert self.kv_group is not None, "connect() comes first"
        dk, dv = dk.contiguous(), dv.contiguous()
        for gradient in (dk, dv):
            dist.all_reduce(gradient, group=self.kv_group)
        return dk, dv


class Gather(Core):
    """Every rank ends with all heads, contiguous in the implementation's layout.

    Where the chunks of all ranks are one block of the output (batch 1, layout "bhsd") they are gathered in place; elsewhere
    a copy puts them there, and is part of the time.
    """

    def __init__(self, spread: Spread):
        super().__init__(spread)
        self.in_place = self.partition.interleaved and spread.workload.batch == 1 and self.head_dim == 1

    def __call__(self, share: list[Share]) -> torch.Tensor:
        p = self.partition
        shape = p.padded.shapes(self.spread.layout)["out"]
        full = torch.empty(shape, dtype=p.padded.dtype, device=self.spread.device)
        pending: list[tuple[int, torch.Tensor, dist.Work]] = []
        for chunk, (kernel, tensors) in enumerate(zip(self.kernels, share, strict=True)):
            out = kernel(*tensors)
            into = self.block(full, chunk) if self.in_place else out.new_empty(p.size, *out.shape)
            work = all_gather(into, out)
            if pending:  # behind the kernel just enqueued, which hides it
                self.settle(full, *pending.pop())
            pending.append((chunk, into, work))
        self.settle(full, *pending.pop())
        return self.without_padding(full)

    def without_padding(self, full: torch.Tensor) -> torch.Tensor:
        real = self.partition.real_slots
        return full if real is None else full[(slice(None),) * self.head_dim + (real,)]

    def settle(self, full: torch.Tensor, chunk: int, gathered: torch.Tensor, work: dist.Work) -> None:
        """Wait for a chunk of all ranks, and put it in its place."""
        work.wait()
        if self.in_place:
            return
        for rank, part in enumerate(gathered):  # [N, B, …]
            slots = self.partition.slots(rank, chunk)
            full.narrow(self.head_dim, slots.start, len(slots)).copy_(part)

    def block(self, full: torch.Tensor, chunk: int) -> torch.Tensor:
        """The contiguous part of the output that a chunk of all ranks fills."""
        first = self.partition.slots(0, chunk).start
        return full.narrow(self.head_dim, first, self.partition.size * self.partition.chunks[chunk])

    def traffic(self, direction: str = "forward") -> tuple[Traffic, ...]:
        if direction == "backward":
            return super().traffic(direction)
        out = torch.Size(self.partition.padded.shapes()["out"]).numel() * self.spread.workload.dtype.itemsize
        return (Traffic("all_gather", out // self.spread.size, overlapped=len(self.kernels) > 1),)

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return self.bhsd(out)

    @property
    def holding(self) -> Holding:
        w = self.spread.workload
        return Holding(list(range(w.heads)), range(w.q_len))

    def upstream(self, dout: torch.Tensor) -> torch.Tensor:
        return self.in_layout(dout)

    def backward(self, graph: Graph, upstream: torch.Tensor, silent: bool = False) -> Gradients:
        return super().backward(graph, self.my_heads(upstream), silent)

    def my_heads(self, dout: torch.Tensor) -> torch.Tensor:
        """This rank's heads of a gradient of all, contiguous; zeros for padding."""
        if self.partition.real_slots is not None:
            return self.in_layout(pick(self.bhsd(dout), self.heads))
        slots = self.partition.slots(self.spread.rank, 0)
        return dout.narrow(self.head_dim, slots.start, len(slots)).contiguous()


class GatherOverlapped(Gather):
    """Gather in chunks of heads: one on its way while the next is computed."""

    def chunk_weights(self) -> tuple[int, ...]:
        return self.spread.overlap_chunks

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"overlap_chunks": list(self.spread.overlap_chunks)}

    def __init__(self, spread: Spread):
        super().__init__(spread)
        if len(self.kernels) == 1:
            raise Unsupported("one chunk of heads a rank: there is nothing to overlap with")


FORMS = (
    Form("core", Core),
    Form("gather", Gather),
    Form("gather-overlapped", GatherOverlapped),
)
