"""Tensor parallel with the gather on the copy engines: each chunk is pushed into every rank's output over NVLink.

A collective's kernel takes SMs from attention, and waits for them behind it; a copy takes none.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Kernel, Unsupported
from ..workload import Workload
from .heads import in_proportion
from .peers import Peers
from .plan import Form, Share, Spread
from .tensor import Gather

TILE = 128  # query rows that one thread block of a forward kernel takes: chunks of rows are whole ones


def row_chunks(length: int, weights: tuple[int, ...]) -> list[range]:
    """Query rows in chunks of whole tiles, about in proportion to the weights.

    The last rows come first: with a causal mask they see the most keys, and the last chunk's copy hides behind nothing.
    """
    chunks, stop = [], length
    for tiles in in_proportion(-(-length // TILE), weights):
        start = max(0, -(-stop // TILE) - tiles) * TILE
        chunks.append(range(start, stop))
        stop = start
    return chunks


class GatherCopied(Gather):
    """`gather` in chunks of heads or of query rows, each on its way while the next is computed. The next call writes to the
    same buffer.

    A rank's heads are a block of memory in the layout "bhsd", and a column in "bshd", whose width is what its copies run
    at: so rows are cut there, unless told otherwise.
    """

    peers_of = Peers  # how the ranks reach each other's outputs

    def __init__(self, spread: Spread):
        self.peers_of.check(spread.device, spread.size)
        along = spread.overlap_along
        self.along = along if along != "auto" else "heads" if spread.layout == "bhsd" else "rows"
        w = spread.workload
        if self.along == "rows" and w.blind_rows:
            raise Unsupported("rows that see no key make no chunk: --overlap-along heads")
        self.rows = row_chunks(w.q_len, spread.overlap_chunks if self.along == "rows" else (1,))
        super().__init__(spread)
        if len(self.kernels) == 1:
            raise Unsupported(f"one chunk of {self.along} a rank: there is nothing to overlap with")
        self.row_dim = 3 - self.head_dim
        self.peers: Any = None

    @property
    def options(self) -> dict[str, Any]:
        chunks, streams = list(self.spread.overlap_chunks), list(self.streams)
        return super().options | {"overlap_chunks": chunks, "overlap_along": self.along, "overlap_streams": streams}

    @property
    def streams(self) -> tuple[int, int]:
        """How many streams compute, and how many push."""
        computing, pushing = self.spread.overlap_streams
        return computing if self.spread.implementation.concurrent else 1, pushing

    def chunk_weights(self) -> tuple[int, ...]:
        return self.spread.overlap_chunks if self.along == "heads" else (1,)

    def chunk_workloads(self) -> list[Workload]:
        if self.along == "heads":
            return super().chunk_workloads()
        whole = self.partition.local(0)
        return [whole.replace(q_len=len(rows), kv_len=self.keys(rows)) for rows in self.rows]

    def build_kernels(self) -> list[Kernel]:
        """One a chunk where several streams compute: a kernel may own a workspace or a handle, for one call at a time."""
        return super().build_kernels() if self.streams[0] == 1 else [self.spread.build(w) for w in self.locals]

    def keys(self, rows: range) -> int:
        """How many keys, from the first, a chunk of query rows may see."""
        w = self.spread.workload
        return rows.stop + w.offset if w.causal else w.kv_len

    def share(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Share]:
        shares = super().share(q, k, v)
        if self.along == "heads":
            return shares
        ((q, k, v),) = shares
        return [
            (self.cut(q, rows), self.cut(k, range(self.keys(rows))), self.cut(v, range(self.keys(rows)))) for rows in self.rows
        ]

    def cut(self, tensor: torch.Tensor, rows: range) -> torch.Tensor:
        return tensor.narrow(self.row_dim, rows.start, len(rows)).contiguous()

    def rehearse(self, share: list[Share]) -> None:
        self.attend(share)  # the streams come with the peers

    def connect(self) -> None:
        super().connect()
        p, spread = self.partition, self.spread
        shape = p.padded.shapes(spread.layout)["out"]
        self.peers = self.peers_of(shape, p.padded.dtype, spread.rank, spread.size, self.streams)
        self.places = [[self.place(full, chunk) for full in self.peers.outputs] for chunk in range(len(self.kernels))]

    def place(self, full: torch.Tensor, chunk: int) -> torch.Tensor:
        """Where a chunk of this rank's goes in an output."""
        by_heads = self.along == "heads"
        slots, rows = self.partition.slots(self.spread.rank, chunk if by_heads else 0), self.rows[0 if by_heads else chunk]
        return full.narrow(self.head_dim, slots.start, len(slots)).narrow(self.row_dim, rows.start, len(rows))

    def __call__(self, share: list[Share]) -> torch.Tensor:
        peers = self.peers
        peers.enter()
        for chunk, (kernel, tensors, places) in enumerate(zip(self.kernels, share, self.places, strict=True)):
            with peers.computing(chunk):
                peers.push(kernel(*tensors), places)
        peers.leave()
        return self.without_padding(peers.outputs[self.spread.rank])

    def silent(self, share: list[Share]) -> torch.Tensor:
        """The chunks on the streams that compute them when they are sent."""
        self.peers.fork()
        outs = []
        for chunk, (kernel, tensors) in enumerate(zip(self.kernels, share, strict=True)):
            with self.peers.computing(chunk):
                outs.append(kernel(*tensors))
        self.peers.join()
        return outs[0]


FORMS = (Form("gather-copied", GatherCopied),)
