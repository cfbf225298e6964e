"""How strided copies become blocks that a copy engine takes, rows become chunks, and plans of chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_impls import Workload
from attn_impls.parallel.copied import GatherCopied, row_chunks
from attn_impls.parallel.peers import Peers, blocks
from attn_impls.parallel.plan import Spread
from attn_impls.parallel.tensor import Gather, GatherOverlapped
from attn_impls.registry import Implementation


def moved(target, source):
    """The copy, block by block, on flat memory."""
    to, from_ = (t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in (target, source))
    for block in blocks(target, source):
        for row in range(block.rows):
            first = target.storage_offset() + block.target + row * block.target_pitch
            start = source.storage_offset() + block.source + row * block.source_pitch
            to[first : first + block.width] = from_[start : start + block.width]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.permutations(range(4)), st.data())
def test_blocks_copy_what_copy_does(shape, order, data):
    whole = [size + data.draw(st.integers(0, 2)) for size in shape]
    base = torch.full([whole[n] for n in order], -1.0)
    target = base.permute([order.index(n) for n in range(4)])
    for dim, size in enumerate(shape):
        target = target.narrow(dim, data.draw(st.integers(0, whole[dim] - size)), size)
    source = torch.randn(shape)
    expected = base.clone()
    expected.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    moved(target, source)
    assert torch.equal(base, expected)


@pytest.mark.parametrize(
    ("full", "dim", "count", "rows", "width"),
    [
        ((1, 32, 64, 8), 1, 1, 1, 16 * 64 * 8),  # bhsd: one block of memory
        ((3, 32, 64, 8), 1, 1, 3, 16 * 64 * 8),  # a row for each of the batch
        ((1, 64, 32, 8), 2, 1, 64, 16 * 8),  # bshd: a column
        ((3, 64, 32, 8), 2, 1, 192, 16 * 8),
    ],
)
def test_a_rank_s_heads_are_one_block(full, dim, count, rows, width):
    target = torch.empty(full).narrow(dim, 16, 16)
    found = blocks(target, torch.empty(target.shape))
    assert (len(found), found[0].rows, found[0].width) == (count, rows, width)


def test_a_part_of_a_batch_s_rows_takes_a_block_each():
    target = torch.empty(3, 64, 32, 8).narrow(2, 16, 16).narrow(1, 0, 32)
    assert [(block.rows, block.width) for block in blocks(target, torch.empty(target.shape))] == [(32, 16 * 8)] * 3


@pytest.mark.parametrize(
    ("length", "weights", "chunks"),
    [
        (1024, (4, 2, 1, 1), [(512, 1024), (256, 512), (128, 256), (0, 128)]),
        (320, (1, 1), [(128, 320), (0, 128)]),
        (100, (1, 1), [(0, 100)]),
        (8192, (3, 1), [(2048, 8192), (0, 2048)]),
    ],
)
def test_rows_are_cut_at_tiles_the_last_first(length, weights, chunks):
    assert [(rows.start, rows.stop) for rows in row_chunks(length, weights)] == chunks


@pytest.fixture
def planned(monkeypatch):
    """`planned(plan class, along, streams, concurrent)`, in three chunks, on one of two ranks."""
    monkeypatch.setattr(Peers, "check", lambda *_: None)

    def build(w):
        return lambda *_: w

    def make(plan, along="auto", streams=2, concurrent=True):
        workload, overlap = Workload.parse("b1-h8-s512-d32-bf16"), {"overlap_along": along, "overlap_streams": (streams, 1)}
        implementation = Implementation("any", build, concurrent=concurrent)
        return plan(Spread(workload, implementation, "cpu", 0, 2, build, overlap_chunks=(2, 1, 1), **overlap))

    return make


@pytest.mark.parametrize(
    ("plan", "along", "streams", "kernels"),
    [
        (GatherOverlapped, "heads", 2, 2),
        (GatherCopied, "heads", 1, 2),
        (GatherCopied, "heads", 2, 3),  # which may run at the same time, so none shares another's workspace
        (GatherCopied, "rows", 2, 3),
    ],
)
def test_chunks_on_several_streams_share_no_kernel(planned, plan, along, streams, kernels):
    made = planned(plan, along, streams)
    assert [kernel() for kernel in made.kernels] == made.locals
    assert len(set(made.kernels)) == kernels


def test_a_plan_names_the_options_that_concern_it(planned):
    assert planned(Gather).options == {"pad_heads": False}
    assert planned(GatherOverlapped).options == {"pad_heads": False, "overlap_chunks": [2, 1, 1]}
    overlap = {"overlap_chunks": [2, 1, 1], "overlap_along": "heads", "overlap_streams": [2, 1]}
    assert planned(GatherCopied).options == {"pad_heads": False, **overlap}


def test_kernels_that_must_not_run_at_once_get_one_stream_to_compute_on(planned):
    assert planned(GatherCopied, concurrent=False).options["overlap_streams"] == [1, 1]
    assert len(set(planned(GatherCopied, concurrent=False).kernels)) == 2  # chunks of one size share one
