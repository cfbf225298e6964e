"""The gather by copies: chunks of heads and of rows land in their places, in both layouts, on every number of streams.

Without GPUs the ranks' outputs are files that all of them map, and blocks are moved row by row as a copy engine would.
"""

import contextlib
import ctypes
import dataclasses
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sharding import IMPLEMENTATIONS, judged

from attn_impls.parallel import peers
from attn_impls.parallel.copied import GatherCopied
from attn_impls.parallel.peers import Peers

pytestmark = pytest.mark.distributed(strategy="tensor")

LONG = "b1-h8-s320-d32-causal-fp32"  # three tiles of query rows, the last not whole
BATCHED = "b2-h16kv8-s320-d32-causal-fp32"
FULL = "b2-h8kv1-q192kv320-d32-fp32"  # one KV head on all ranks
WINDOW = "b1-h8-q192kv320-d32-causal-win100-fp32"


class HostRuntime:
    """CUDA's copies, made by the host."""

    @staticmethod
    def cudaMemcpyAsync(to, from_, width, kind, stream):  # noqa: ARG004
        ctypes.memmove(to, from_, width)

    @staticmethod
    def cudaMemcpy2DAsync(to, pitch, from_, source_pitch, width, rows, kind, stream):  # noqa: ARG004
        for row in range(rows):
            ctypes.memmove(to + row * pitch, from_ + row * source_pitch, width)


class FilePeers:
    """Every rank's output in a file that all map."""

    @staticmethod
    def check(device, size):
        pass

    def __init__(self, shape, dtype, rank, size, streams):
        self.rank, self.streams = rank, streams
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        names = [f"{folder[0]}/{n}" for n in range(size)]
        torch.from_file(names[rank], shared=True, size=math.prod(shape), dtype=dtype).fill_(float("nan"))
        dist.barrier()
        self.outputs = [torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape) for name in names]

    def fork(self):
        pass

    def join(self):
        pass

    def enter(self):
        dist.barrier()

    def computing(self, chunk):  # noqa: ARG002
        return contextlib.nullcontext()

    def push(self, out, places):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers, "_runtime", lambda: HostRuntime)
            for place in places:
                peers.copy(place, out, SimpleNamespace(cuda_stream=0))

    def leave(self):
        dist.barrier()


class Copied(GatherCopied):
    peers_of = FilePeers  # or what GPUs have


class ChunksSwapped(Copied):
    """The first two chunks of heads change places."""

    def place(self, full, chunk):
        return super().place(full, {0: 1, 1: 0}.get(chunk, chunk))


class RanksSwapped(Copied):
    """Every rank writes where the next one should."""

    def place(self, full, chunk):
        right = self.spread
        self.spread = dataclasses.replace(right, rank=(right.rank + 1) % right.size)
        try:
            return super().place(full, chunk)
        finally:
            self.spread = right


class KeysOfTheNextTile(Copied):
    """A chunk of rows is given more keys than its last row may see, so that the mask shifts."""

    def keys(self, rows):
        return min(super().keys(rows) + 1, self.spread.workload.kv_len)


class LastChunkKept(Copied):
    """The last chunk never leaves its rank."""

    def __call__(self, share):
        push, count = self.peers.push, [0]

        def forgetful(out, places):
            count[0] += 1
            push(out, places if count[0] < len(self.kernels) else [places[self.spread.rank]] * len(places))

        self.peers.push = forgetful
        try:
            return super().__call__(share)
        finally:
            self.peers.push = push


MUTANTS = [
    (ChunksSwapped, "heads"),
    (RanksSwapped, "heads"),
    (RanksSwapped, "rows"),
    (KeysOfTheNextTile, "rows"),
    (LastChunkKept, "rows"),
]


@pytest.fixture
def chunks(spreads, monkeypatch):
    """Sets what is cut, and how."""
    if spreads.session.device == "cuda":
        monkeypatch.setattr(Copied, "peers_of", Peers)

    def cut(along, weights=(1, 1), streams=(1, 1)):
        changes = {"overlap_along": along, "overlap_chunks": weights, "overlap_streams": streams}
        monkeypatch.setattr(spreads.session, "selection", dataclasses.replace(spreads.session.selection, **changes))

    return cut


@pytest.mark.parametrize("along", ["heads", "rows"])
@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload_id", [LONG, BATCHED, FULL, WINDOW])
def test_every_chunk_lands_in_its_place(spreads, chunks, workload_id, layout, along):
    chunks(along)
    assert judged(spreads, Copied, workload_id, layout).failure == ""


@pytest.mark.parametrize(("plan", "along"), MUTANTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_mutant_is_rejected(spreads, chunks, plan, along):
    if spreads.ranks.size == 1:
        pytest.skip("one rank has nothing to get wrong")
    chunks(along)
    assert judged(spreads, plan, LONG).error_over_budget > 2


def test_padded_heads_land_too(spreads, chunks, monkeypatch):
    chunks("rows")
    monkeypatch.setattr(spreads.session, "selection", dataclasses.replace(spreads.session.selection, pad_heads=True))
    assert judged(spreads, Copied, f"b1-h{spreads.ranks.size + 1}-s320-d32-causal-fp32", "bshd").failure == ""


def test_auto_cuts_rows_where_heads_would_be_narrow(spreads, chunks):
    chunks("auto")
    assert judged(spreads, Copied, LONG, "bshd").failure == ""
    with pytest.raises(pytest.skip.Exception, match="one chunk of rows a rank"):
        judged(spreads, Copied, "b1-h8-s96-d32-fp32", "bshd")


def test_without_gpus_it_says_why(spreads):
    if spreads.session.device == "cuda":
        pytest.skip("there are GPUs")
    with pytest.raises(pytest.skip.Exception, match="a GPU's"):
        judged(spreads, GatherCopied, LONG)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("along", ["heads", "rows"])
@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
def test_several_streams_do_the_same(spreads, chunks, layout, along, streams):
    chunks(along, (1, 1, 1), streams)
    for workload_id in (LONG, BATCHED, FULL):
        assert judged(spreads, Copied, workload_id, layout).failure == ""
