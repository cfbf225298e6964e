"""Wrong ways to share out attention, each rejected on every rank by the check that the right ways pass."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from attn_impls import Workload
from attn_impls.harness.case import Case
from attn_impls.harness.inputs import Inputs
from attn_impls.harness.judge import Problem
from attn_impls.harness.spread import outcome
from attn_impls.parallel import Form
from attn_impls.parallel.tensor import Core, Gather, GatherOverlapped, Project, ProjectScatter
from attn_impls.registry import REGISTRY, Implementation, discover

pytestmark = pytest.mark.distributed(strategy="tensor")

MHA = "b1-h8-s96-d32-causal-fp32"
GQA = "b2-h16kv8-s96-d32-causal-fp32"
FEW_KV = "b1-h16kv2-s96-d32-causal-fp32"
SHARED_KV = "b1-h8kv1-s96-d32-fp32"  # one KV head on all ranks


class HeadsSwapped(Core):
    """Two of a rank's query heads change places."""

    def share(self, inputs):
        swapped = inputs._replace(q=inputs.q[:, [1, 0, *range(2, inputs.q.shape[1])]])
        return super().share(swapped)


class ReplicatedKv(Core):
    """q sharded, all KV heads on each rank, and the kernel left to map them as if its query heads were all there are."""

    def __init__(self, spread):
        super().__init__(spread)
        self.kernels = [spread.build(self.partition.local(0).replace(kv_heads=spread.workload.kv_heads))]

    def share(self, inputs):
        (mine,) = super().share(inputs)
        return [Inputs(mine.q, inputs.k, inputs.v)]


class RanksReversed(Core):
    """Rank r takes the heads of rank N − 1 − r."""

    def share(self, inputs):
        rank = self.spread.size - 1 - self.spread.rank
        self.spread = dataclasses.replace(self.spread, rank=rank)
        try:
            return super().share(inputs)
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


class SharedKvNotSummed(Core):
    def sum_shared(self, dk, dv):
        pass


class SharedKvSummedOverAll(Core):
    """dk and dv summed once more, over every rank."""

    def sum_shared(self, dk, dv):
        super().sum_shared(dk, dv)
        for gradient in (dk, dv):
            dist.all_reduce(gradient)


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
IMPLEMENTATIONS = {
    "bhsd": lambda: REGISTRY["sdpa-math"],
    "bshd": lambda: Implementation("sdpa-math-bshd", _transposed, layout="bshd"),
}
RIGHT = [(plan, w) for plan in (Core, Gather, GatherOverlapped, Project, ProjectScatter) for w in (MHA, GQA, SHARED_KV)]
BACKWARD = [SharedKvNotSummed, SharedKvSummedOverAll]


def _transposed(w):
    """SDPA's math backend on the layout of the flash-attn libraries."""
    kernel = REGISTRY["sdpa-math"](w)
    return lambda q, k, v: kernel(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2).contiguous()


@pytest.fixture
def judged(spreads):
    """The verdict on a plan class for a workload, and the gradients' errors."""
    discover()

    def judge(plan, identity, gradients=False, layout="bhsd"):
        w, device = Workload.parse(identity), spreads.session.device
        case = Case(w, IMPLEMENTATIONS[layout](), device)
        problem, form = Problem(w, device, 0), Form(plan.__name__, plan)
        if gradients:
            return spreads.gradient_errors(case, form, problem)
        spreads._answers = (None, {})
        with outcome(case):
            return spreads.verdict(case, form, spreads.plan(case, form, problem)[0], problem, None)

    return judge


@pytest.fixture(autouse=True)
def several_ranks(spreads):
    if spreads.ranks.size == 1:
        pytest.skip("one rank has nothing to get wrong")


@pytest.mark.parametrize(("plan", "workload_id"), RIGHT, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
def test_the_right_way_passes(judged, layout, plan, workload_id):
    assert judged(plan, workload_id, layout=layout).failure == ""


@pytest.mark.parametrize(("plan", "workload_id"), FORWARD, ids=lambda x: getattr(x, "__name__", x))
def test_a_mutant_is_rejected(judged, plan, workload_id):
    assert judged(plan, workload_id).error_over_budget > 2


@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload_id", [MHA, GQA, SHARED_KV])
def test_the_right_gradients_pass(judged, workload_id, layout):
    errors = judged(Core, workload_id, gradients=True, layout=layout)
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("plan", BACKWARD, ids=lambda x: x.__name__)
def test_a_gradient_mutant_is_rejected(judged, plan):
    errors = judged(plan, SHARED_KV, gradients=True)
    assert errors["q"] <= 1
    assert min(errors["k"], errors["v"]) > 2, errors


def test_a_rank_of_padding_alone_is_right(judged, spreads, monkeypatch):
    monkeypatch.setattr(spreads.session, "selection", dataclasses.replace(spreads.session.selection, pad_heads=True))
    heads = spreads.ranks.size + 1
    for plan in (Core, Gather, Project):
        verdict = judged(plan, f"b1-h{heads}-s64-d32-causal-fp32")
        assert verdict.failure == "", plan
    assert torch.isfinite(torch.tensor(verdict.error_over_budget))
