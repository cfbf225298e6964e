"""Which heads each rank gets: every head once, each query beside its own KV head, and clear words where it does not go."""

import ast
from pathlib import Path

import pytest

from attn_impls import Unsupported, Workload, parallel
from attn_impls.parallel.heads import partition


def workload(heads, kv_heads=None):
    return Workload(batch=1, heads=heads, kv_heads=kv_heads, q_len=64, head_dim=32)


SPLITS = [  # heads, KV heads, ranks
    (32, 32, 1),
    (32, 32, 2),
    (32, 8, 2),
    (32, 8, 8),
    (32, 8, 16),
    (32, 8, 32),
    (8, 1, 4),
    (12, 6, 3),
]
WEIGHTS = [(1,), (1, 1), (4, 2, 1, 1)]


def check(p):
    heads = [head for rank in range(p.size) for head in p.all_query_heads(rank) if head >= 0]
    assert sorted(heads) == list(range(p.workload.heads))
    for rank in range(p.size):
        assert len(p.all_query_heads(rank)) == p.local_heads
        for chunk in range(len(p.chunks)):
            queries, kvs, local = p.query_heads(rank, chunk), p.kv_heads(rank, chunk), p.local(chunk)
            assert (local.heads, local.kv_heads) == (len(queries), len(kvs))
            for position, head in enumerate(queries):
                if head >= 0:  # what the kernel reads is the head's own
                    assert kvs[position // local.group] == head // p.workload.group


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SPLITS)
def test_every_head_once_and_each_query_beside_its_kv_head(heads, kv_heads, size, weights):
    p = partition(workload(heads, kv_heads), size, weights)
    check(p)
    assert p.bound == 1
    assert p.real_slots is None
    assert p.sharing == max(1, size // kv_heads)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SPLITS)
def test_an_interleaved_chunk_of_all_ranks_is_one_block_in_rank_order(heads, kv_heads, size, weights):
    p = partition(workload(heads, kv_heads), size, weights)
    assert p.interleaved == (kv_heads % size == 0)
    if p.interleaved:
        slots = [slot for chunk in range(len(p.chunks)) for rank in range(size) for slot in p.slots(rank, chunk)]
        assert slots == list(range(heads))


@pytest.mark.parametrize(
    ("heads", "weights", "chunks"),
    [(32, (4, 2, 1, 1), (8, 4, 2, 2)), (32, (1, 1), (8, 8)), (6, (4, 2, 1, 1), (1, 1, 1)), (2, (4, 2, 1, 1), (1,))],
)
def test_chunks_follow_the_weights(heads, weights, chunks):
    assert partition(workload(heads), 2, weights).chunks == chunks


def test_chunks_keep_the_queries_of_a_kv_head_together():
    assert partition(workload(32, 8), 2, (2, 1)).chunks == (12, 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "padded", "bound"),
    [(3, 3, 2, 4, 0.75), (6, 3, 4, 8, 0.75), (5, 5, 8, 8, 0.625), (6, 2, 4, 8, 0.75), (1, 1, 4, 4, 0.25)],
)
def test_padding_on_request(heads, kv_heads, size, padded, bound):
    with pytest.raises(Unsupported, match=f"--pad-heads computes {padded} heads instead of {heads}"):
        partition(workload(heads, kv_heads), size)
    p = partition(workload(heads, kv_heads), size, pad=True)
    check(p)
    assert (p.padded.heads, p.bound) == (padded, bound)
    assert [p._head(slot) for slot in p.real_slots] == list(range(heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "words"),
    [(6, 6, 4, "heads (6) is not divisible by the 4 ranks"), (12, 3, 2, "kv_heads (3) neither divides the 2 ranks")],
)
def test_what_cannot_be_shared_is_said(heads, kv_heads, size, words):
    with pytest.raises(Unsupported) as caught:
        partition(workload(heads, kv_heads), size)
    assert words in str(caught.value)


@pytest.mark.parametrize("file", sorted(Path(parallel.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_strategies_import_nothing_of_the_harness(file):
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or "" for node in imports] + [alias.name for node in imports for alias in node.names]
    assert not [name for name in names if "harness" in name]
