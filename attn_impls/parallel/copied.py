"""Tensor parallel with the gather on the copy engines: each chunk of heads is pushed into every rank's output over NVLink.

A collective's kernel takes SMs from attention, and waits for them behind it; a copy takes none. The output lives in symmetric
memory (torch.distributed._symmetric_memory), which maps every rank's buffer into each of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..registry import Unsupported
from .plan import Form, Spread
from .tensor import GatherOverlapped


class GatherCopied(GatherOverlapped):
    """`gather-overlapped` with copies for collectives. The output's buffer is used again by the next call."""

    def __init__(self, spread: Spread):
        if spread.device != "cuda":
            raise Unsupported("copy engines and symmetric memory are a GPU's")
        super().__init__(spread)
        if not self.in_place:
            raise Unsupported('a copy moves one block: layout "bhsd" at batch 1 only')
        self.handle: Any = None
        self.outputs: list[torch.Tensor] = []  # of every rank, seen from here

    def connect(self) -> None:
        # private in name, the documented way to it: PyTorch's own tensor-parallel overlap stands on it
        from torch.distributed import _symmetric_memory as symmetric

        super().connect()
        p, device = self.partition, torch.device("cuda", torch.cuda.current_device())
        shape = p.padded.shapes(self.spread.layout)["out"]
        mine = symmetric.empty(shape, dtype=p.padded.dtype, device=device)
        world = dist.group.WORLD
        assert world is not None, "the ranks have met"
        self.handle = symmetric.rendezvous(mine, world)
        self.outputs = [self.handle.get_buffer(rank, shape, p.padded.dtype) for rank in range(p.size)]
        self.copies = torch.cuda.Stream()

    def __call__(self, share: list[Any]) -> torch.Tensor:
        compute, rank = torch.cuda.current_stream(), self.spread.rank
        self.handle.barrier(channel=0)  # nobody reads the last result any more
        for chunk, (kernel, inputs) in enumerate(zip(self.kernels, share, strict=True)):
            out = kernel(*inputs)
            self.copies.wait_stream(compute)
            slots = self.partition.slots(rank, chunk)
            with torch.cuda.stream(self.copies):
                for output in self.outputs:
                    output.narrow(self.head_dim, slots.start, len(slots)).copy_(out, non_blocking=True)
            out.record_stream(self.copies)
        compute.wait_stream(self.copies)
        self.handle.barrier(channel=1)  # everybody's heads have landed
        full, real = self.outputs[rank], self.partition.real_slots
        return full if real is None else full[:, real]


FORMS = (Form("gather-copied", GatherCopied),)
