"""Wrong ways to share out attention, each rejected on every rank by the check that the right ways pass."""

import dataclasses

import pytest
import torch
from sharding import FEW_KV, GQA, IMPLEMENTATIONS, MHA, SHARED_KV, judged

from attn_impls.parallel.projected import Project, ProjectScatter
from attn_impls.parallel.tensor import Core, Gather, GatherOverlapped

pytestmark = pytest.mark.distributed(strategy="tensor")


class HeadsSwapped(Core):
    """Two of a rank's query heads change places."""

    def share(self, q, k, v):
        return super().share(q[:, [1, 0, *range(2, q.shape[1])]], k, v)


class ReplicatedKv(Core):
    """q sharded, all KV heads on each rank, and the kernel left to map them as if its query heads were all there are."""

    def __init__(self, spread):
        super().__init__(spread)
        self.locals = [self.partition.local(0).replace(kv_heads=spread.workload.kv_heads)]
        self.kernels = [spread.build(self.locals[0])]

    def share(self, q, k, v):
        ((mine, _, _),) = super().share(q, k, v)
        return [(mine, k, v)]


class RanksReversed(Core):
    """Rank r takes the heads of rank N − 1 − r."""

    def share(self, q, k, v):
        rank = self.spread.size - 1 - self.spread.rank
        self.spread = dataclasses.replace(self.spread, rank=rank)
        try:
            return super().share(q, k, v)
        finally:
            self.spread = dataclasses.replace(self.spread, rank=self.spread.size - 1 - rank)


class StaleShard(Gather):
    """The last rank hands in what it computed from the first inputs it ever saw."""

    first = None

    def __call__(self, share):
        if self.first is None:
            self.first = share
        return super().__call__(self.first if self.spread.rank == self.spread.size - 1 else share)


class GatheredAlongRows(Gather):
    """The gathered parts read as if ranks held rows and not heads."""

    def __call__(self, share):
        full = super().__call__(share)  # [B, H, S, D]
        b, h, s, d = full.shape
        n = self.spread.size
        return full.view(b, n, h // n, s, d).transpose(1, 2).reshape(b, h, s, d)


class ChunksMisplaced(GatherOverlapped):
    """The last two chunks change places."""

    def block(self, full, chunk):
        last = len(self.partition.chunks) - 1
        return super().block(full, {last: last - 1, last - 1: last}.get(chunk, chunk))


class PaddingInFront(Gather):
    """Every rank's part shifted by one head."""

    def __call__(self, share):
        return super().__call__(share).roll(1, self.head_dim)


class NotReduced(Project):
    def sum(self, partial):
        pass


class ReducedTwice(Project):
    def sum(self, partial):
        super().sum(partial)
        super().sum(partial)


class WeightOfAnotherRank(Project):
    """The projection's rows of the next rank."""

    def __init__(self, spread):
        super().__init__(dataclasses.replace(spread, rank=(spread.rank + 1) % spread.size))
        self.spread = spread


class ScatteredInReverse(ProjectScatter):
    """Rank r keeps the rows of rank N − 1 − r."""

    def rows(self, out):
        rows = super().rows(out)
        return rows.unflatten(0, (self.spread.size, -1)).flip(0).flatten(0, 1)


FORWARD = [
    (HeadsSwapped, MHA),
    (ReplicatedKv, FEW_KV),
    (RanksReversed, MHA),
    (StaleShard, MHA),
    (GatheredAlongRows, MHA),
    (ChunksMisplaced, MHA),
    (PaddingInFront, GQA),
    (NotReduced, MHA),
    (ReducedTwice, MHA),
    (WeightOfAnotherRank, MHA),
    (ScatteredInReverse, GQA),
]
RIGHT = [(plan, w) for plan in (Core, Gather, GatherOverlapped, Project, ProjectScatter) for w in (MHA, GQA, SHARED_KV)]


@pytest.fixture(autouse=True)
def several_ranks(spreads):
    if spreads.ranks.size == 1:
        pytest.skip("one rank has nothing to get wrong")


@pytest.mark.parametrize(("plan", "workload_id"), RIGHT, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
def test_the_right_way_passes(spreads, layout, plan, workload_id):
    assert judged(spreads, plan, workload_id, layout).failure == ""


@pytest.mark.parametrize(("plan", "workload_id"), FORWARD, ids=lambda x: getattr(x, "__name__", x))
def test_a_mutant_is_rejected(spreads, plan, workload_id):
    assert judged(spreads, plan, workload_id).error_over_budget > 2


def test_a_rank_of_padding_alone_is_right(spreads, monkeypatch):
    monkeypatch.setattr(spreads.session, "selection", dataclasses.replace(spreads.session.selection, pad_heads=True))
    heads = spreads.ranks.size + 1
    for plan in (Core, Gather, Project):
        verdict = judged(spreads, plan, f"b1-h{heads}-s64-d32-causal-fp32")
        assert verdict.failure == "", plan
    assert torch.isfinite(torch.tensor(verdict.error_over_budget))
