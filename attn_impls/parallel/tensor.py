"""Tensor parallelism: heads split over ranks (Megatron-LM: Shoeybi et al., 2019, arXiv 1909.08053).

core: each rank's heads, nothing sent. gather: the output of all heads on every rank. gather-overlapped: the same in chunks,
one chunk on its way while the next is computed. project: the row-parallel output projection, summed over ranks.
project-scatter: the same with the sum's rows left scattered (sequence parallelism: Korthikanti et al., 2022, arXiv 2205.05198).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ..harness.inputs import Inputs
from ..harness.oracle import PLAIN, TOLERANCE, Reference, attend
from ..registry import Unsupported
from ..workload import Workload
from .collectives import all_gather, reduce_scatter
from .heads import partition
from .plan import Form, Plan, Spread, Traffic, only_heads

NO_BACKWARD = "does not support backward"  # torch flex_attention on a CPU


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
        locals_ = [self.partition.local(chunk) for chunk in range(len(self.partition.chunks))]
        built = {w: spread.build(w) for w in dict.fromkeys(locals_)}
        self.kernels = [built[w] for w in locals_]
        self.head_dim = 1 if spread.layout == "bhsd" else 2  # the dimension of heads
        self.kv_group: dist.ProcessGroup | None = None

    def chunk_weights(self) -> tuple[int, ...]:
        return (1,)

    def connect(self) -> None:
        sharing = self.partition.sharing
        if sharing > 1:  # every rank makes every group, in one order
            groups = [dist.new_group(list(range(first, first + sharing))) for first in range(0, self.spread.size, sharing)]
            self.kv_group = groups[self.spread.rank // sharing]

    def share(self, inputs: Inputs) -> list[Inputs]:
        shares = []
        for chunk in range(len(self.partition.chunks)):
            q = pick(inputs.q, self.partition.query_heads(self.spread.rank, chunk))
            kv_heads = self.partition.kv_heads(self.spread.rank, chunk)
            shares.append(Inputs(q, pick(inputs.k, kv_heads), pick(inputs.v, kv_heads)).as_layout(self.spread.layout))
        return shares

    def attend(self, share: list[Inputs]) -> list[torch.Tensor]:
        return [kernel(*inputs) for kernel, inputs in zip(self.kernels, share, strict=True)]

    def __call__(self, share: list[Inputs]) -> torch.Tensor:
        return self.attend(share)[0]

    def silent(self, share: list[Inputs]) -> torch.Tensor:
        return self.attend(share)[0]

    def bhsd(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.head_dim == 1 else out.transpose(1, 2)

    @property
    def heads(self) -> list[int]:
        return self.partition.all_query_heads(self.spread.rank)

    @property
    def kv_heads(self) -> list[int]:
        return self.partition.all_kv_heads(self.spread.rank)

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return self.bhsd(out)[:, [position for position, head in enumerate(self.heads) if head >= 0]]

    def answer(self, reference: Reference, inputs: Inputs) -> Reference:  # noqa: ARG002  (one signature for all plans)
        return only_heads(reference, [head for head in self.heads if head >= 0])

    def gradients(self, share: list[Inputs], dout: torch.Tensor) -> Inputs:
        """dq of this rank's query heads, dk and dv of its KV heads ("bhsd"), for the gradient dout [B, H, Sq, DV] of all."""
        (inputs,), layout = share, self.spread.layout
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        mine = pick(dout, self.heads)
        out = self._with_gradient(leaves)
        found = torch.autograd.grad(out, leaves, mine if layout == "bhsd" else mine.transpose(1, 2).contiguous())
        dq, dk, dv = (self.bhsd(tensor).contiguous() for tensor in found)
        if self.partition.sharing > 1:
            self.sum_shared(dk, dv)
        return Inputs(dq, dk, dv)

    def _with_gradient(self, leaves: list[torch.Tensor]) -> torch.Tensor:
        """The kernel's output with its graph. Raises Unsupported where the kernel says, or shows, that it is forward only."""
        try:
            out = self.kernels[0](*leaves)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if NO_BACKWARD in line), "")
            if reason:
                raise Unsupported(f"forward only: {reason}") from None
            raise
        if not out.requires_grad:
            raise Unsupported("forward only: its output carries no gradient")
        return out

    def sum_shared(self, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Ranks that hold the same KV head each know the gradient of their own queries only: add them up."""
        assert self.kv_group is not None, "connect() comes first"
        for gradient in (dk, dv):
            dist.all_reduce(gradient, group=self.kv_group)


class Gather(Core):
    """Every rank ends with all heads, contiguous in the implementation's layout.

    Where the chunks of all ranks are one block of the output (batch 1, layout "bhsd") they are gathered in place; elsewhere
    a copy puts them there, and is part of the time.
    """

    def __init__(self, spread: Spread):
        super().__init__(spread)
        self.in_place = self.partition.interleaved and spread.workload.batch == 1 and self.head_dim == 1

    def __call__(self, share: list[Inputs]) -> torch.Tensor:
        p = self.partition
        shape = p.padded.shapes(self.spread.layout)["out"]
        full = torch.empty(shape, dtype=p.padded.dtype, device=self.spread.device)
        pending: list[tuple[int, torch.Tensor, dist.Work]] = []
        for chunk, (kernel, inputs) in enumerate(zip(self.kernels, share, strict=True)):
            out = kernel(*inputs)
            into = self.block(full, chunk) if self.in_place else out.new_empty(p.size, *out.shape)
            work = all_gather(into, out)
            if pending:  # behind the kernel just enqueued, which hides it
                self.settle(full, *pending.pop())
            pending.append((chunk, into, work))
        self.settle(full, *pending.pop())
        return full if p.real_slots is None else full[(slice(None),) * self.head_dim + (p.real_slots,)]

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

    def traffic(self) -> Traffic | None:
        out = torch.Size(self.partition.padded.shapes()["out"]).numel() * self.spread.workload.dtype.itemsize
        return Traffic("all_gather", out // self.spread.size, overlapped=len(self.partition.chunks) > 1)

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return self.bhsd(out)

    def answer(self, reference: Reference, inputs: Inputs) -> Reference:  # noqa: ARG002
        return reference


class GatherOverlapped(Gather):
    """Gather in chunks of heads: one on its way while the next is computed."""

    def chunk_weights(self) -> tuple[int, ...]:
        return self.spread.overlap_chunks

    def __init__(self, spread: Spread):
        super().__init__(spread)
        if len(self.partition.chunks) == 1:
            raise Unsupported("one chunk of heads a rank: there is nothing to overlap with")


class Project(Core):
    """The output projection, its rows split like the heads; the ranks' partial products are summed on all ranks."""

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

    def silent(self, share: list[Inputs]) -> torch.Tensor:
        return self.rows(self.attend(share)[0]) @ self.weight

    def __call__(self, share: list[Inputs]) -> torch.Tensor:
        partial = self.silent(share)
        self.sum(partial)
        return partial

    def sum(self, partial: torch.Tensor) -> None:
        dist.all_reduce(partial)

    def traffic(self) -> Traffic | None:
        w = self.spread.workload
        return Traffic("all_reduce", w.batch * w.q_len * self.embed * w.dtype.itemsize)

    def comparable(self, out: torch.Tensor) -> torch.Tensor:
        return out.view(self.spread.workload.batch, 1, -1, self.embed)

    def answer(self, reference: Reference, inputs: Inputs) -> Reference:
        return projected(self.spread.workload, reference, inputs, self.whole_weight(), self.spread.size)


class ProjectScatter(Project):
    """The projection, with rank r keeping the r-th part of the sequence."""

    def __init__(self, spread: Spread):
        if spread.workload.q_len % spread.size:
            raise Unsupported(f"q_len ({spread.workload.q_len}) is not divisible by the {spread.size} ranks")
        super().__init__(spread)

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """[N·B·S/N, h·DV]: the rows of rank 0's part of the sequence first, for every batch."""
        bshd = out.transpose(1, 2) if self.head_dim == 1 else out
        return bshd.unflatten(1, (self.spread.size, -1)).transpose(0, 1).reshape(-1, self.weight.shape[0])

    def __call__(self, share: list[Inputs]) -> torch.Tensor:
        partial = self.silent(share)
        mine = partial.new_empty(len(partial) // self.spread.size, self.embed)
        reduce_scatter(mine, partial)
        return mine

    def traffic(self) -> Traffic | None:
        return super().traffic()._replace(collective="reduce_scatter")  # type: ignore[union-attr]

    def answer(self, reference: Reference, inputs: Inputs) -> Reference:
        whole = super().answer(reference, inputs)
        length = self.spread.workload.q_len // self.spread.size
        first = self.spread.rank * length
        rows = torch.arange(self.spread.workload.q_len, device=whole.out.device) if whole.rows is None else whole.rows
        mine = (rows >= first) & (rows < first + length)
        return Reference(rows[mine] - first, whole.out[:, :, mine], whole.norm[:, :, mine], whole.budget[:, :, mine])


def projected(w: Workload, reference: Reference, inputs: Inputs, weight: torch.Tensor, size: int) -> Reference:
    """The oracle's answer behind the projection, [B, 1, R, E], with the error that doing it plainly in `size` parts makes.

    What attention itself may err passes W, whose entries have variance 1/E, with its size unchanged.
    """

    def side_by_side(out: torch.Tensor) -> torch.Tensor:  # [B, R, H·DV]
        return out.transpose(1, 2).flatten(2)

    out = (side_by_side(reference.out) @ weight.double())[:, None]
    norm = out.norm(dim=-1)
    norm = torch.where(norm > 0, norm, norm.mean())
    before = (reference.budget / TOLERANCE * reference.norm).square().sum(1, keepdim=True).sqrt()
    scale = (before / norm).clamp(min=torch.finfo(w.dtype).eps / 2)
    heads = torch.arange(w.heads * w.v_head_dim, device=weight.device).chunk(size)
    for scaled in PLAIN:
        plain = side_by_side(attend(w, inputs, reference.rows, w.dtype, scaled))
        parts = [plain[..., columns] @ weight[columns] for columns in heads]
        total = parts[0]
        for part in parts[1:]:
            total = total + part  # each partial product and each sum rounded, as between ranks
        error = (total[:, None].double() - out).norm(dim=-1) / norm
        scale = torch.maximum(scale, error.clamp(min=float(error.square().mean().sqrt())))
    return dataclasses.replace(reference, out=out, norm=norm, budget=TOLERANCE * scale)


FORMS = (
    Form("core", Core),
    Form("gather", Gather),
    Form("gather-overlapped", GatherOverlapped),
    Form("project", Project),
    Form("project-scatter", ProjectScatter),
)
