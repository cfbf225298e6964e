"""Gradients of attention that ranks share: every form's right ones pass on every rank, and wrong ways are rejected."""

import dataclasses

import pytest
import torch.distributed as dist
from sharding import IMPLEMENTATIONS, MHA, SHARED_KV, gradients_judged

from attn_impls.parallel.projected import Project, ProjectScatter
from attn_impls.parallel.tensor import Core, Gather, GatherOverlapped

pytestmark = pytest.mark.distributed(strategy="tensor")

GQA = "b2-h8kv4-s64-d32-causal-fp32"
FORMS = (Core, Gather, Project, ProjectScatter)


@pytest.fixture(autouse=True)
def several_ranks(spreads):
    if spreads.ranks.size == 1:
        pytest.skip("one rank has nothing to get wrong")


class SharedKvNotSummed(Core):
    def sum_shared(self, dk, dv):
        return dk, dv


class SharedKvSummedOverAll(Core):
    """dk and dv summed once more, over every rank."""

    def sum_shared(self, dk, dv):
        for gradient in (summed := super().sum_shared(dk, dv)):
            dist.all_reduce(gradient)
        return summed


class SharedKvAveraged(Project):
    def sum_shared(self, dk, dv):
        dk, dv = super().sum_shared(dk, dv)
        return dk / self.partition.sharing, dv / self.partition.sharing


class HeadsOfAnotherRank(Gather):
    """The slice of the next rank's heads."""

    def my_heads(self, dout):
        right = self.spread
        self.spread = dataclasses.replace(right, rank=(right.rank + 1) % right.size)
        try:
            return super().my_heads(dout)
        finally:
            self.spread = right


class GatherSummed(Gather):
    """The replicated gradient summed over the ranks, as if each had its part of it."""

    def my_heads(self, dout):
        summed = dout.clone()
        dist.all_reduce(summed)
        return super().my_heads(summed)


class ProjectSummed(Project):
    """The same of the projected output's gradient."""

    def collect(self, upstream, silent):
        summed = super().collect(upstream, silent).clone()
        dist.all_reduce(summed)
        return summed


class RowsNotGathered(ProjectScatter):
    """Each rank goes on with its own rows of the gradient, in every rank's place."""

    def collect(self, upstream, silent):  # noqa: ARG002
        return super().collect(upstream, silent=True)


class RowsGatheredInReverse(ProjectScatter):
    def collect(self, upstream, silent):
        whole = super().collect(upstream, silent)
        return whole.unflatten(0, (self.spread.size, -1)).flip(0).flatten(0, 1)


class RowsOfAnotherRank(ProjectScatter):
    """The last rank hands in the gradient of the rank before's rows."""

    def upstream(self, dout):
        length = self.spread.workload.q_len // self.spread.size
        last = self.spread.rank == self.spread.size - 1
        return super().upstream(dout.roll(length, 2) if last else dout)


class RowsInPlainOrder(ProjectScatter):
    """The batch taken for the outer dimension of rows that are sorted by rank."""

    def from_rows(self, rows):
        return Project.from_rows(self, rows)


class WeightGradientSummed(Project):
    """dW of each rank's own rows, summed over ranks as if they were parts of one."""

    def backward(self, graph, upstream, silent=False):
        found = super().backward(graph, upstream, silent)
        total = found.weight.contiguous()
        dist.all_reduce(total)
        return found._replace(weight=total)


class WeightMisaligned(Project):
    """The gradient of the heads through a W whose columns are shifted by one."""

    def backward(self, graph, upstream, silent=False):
        right = self.weight
        self.weight = right.roll(1, 1)
        try:
            return super().backward(graph, upstream, silent)
        finally:
            self.weight = right


class PreviousCall(Gather):
    """A buffer handed out again too early."""

    kept = None

    def backward(self, graph, upstream, silent=False):
        found = super().backward(graph, upstream, silent)
        kept, self.kept = self.kept or found, found
        return kept


# the mutant, where, and the gradients that must show it
MUTANTS = [
    (SharedKvNotSummed, SHARED_KV, "kv"),
    (SharedKvSummedOverAll, SHARED_KV, "kv"),
    (SharedKvAveraged, SHARED_KV, "kv"),
    (HeadsOfAnotherRank, MHA, "qkv"),
    (GatherSummed, MHA, "qkv"),
    (PreviousCall, MHA, "qkv"),
    (ProjectSummed, MHA, ("q", "k", "v", "weight")),
    (RowsNotGathered, GQA, ("q", "k", "v", "weight")),
    (RowsGatheredInReverse, GQA, ("q", "k", "v", "weight")),
    (RowsOfAnotherRank, MHA, ("q", "k", "v", "weight")),
    (RowsInPlainOrder, GQA, "qkv"),
    (WeightGradientSummed, MHA, ("weight",)),
    (WeightMisaligned, MHA, "qkv"),
]


@pytest.mark.parametrize("layout", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload_id", [MHA, GQA, SHARED_KV])
@pytest.mark.parametrize("plan", FORMS, ids=lambda x: x.__name__)
def test_the_right_gradients_pass(spreads, plan, workload_id, layout):
    errors = gradients_judged(spreads, plan, workload_id, layout)
    assert set(errors) == {"q", "k", "v"} | ({"weight"} if issubclass(plan, Project) else set())
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("plan", FORMS, ids=lambda x: x.__name__)
def test_gradients_in_bf16_pass(spreads, plan):
    errors = gradients_judged(spreads, plan, "b2-h8kv1-s96-d32-causal-bf16")
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(("plan", "workload_id", "shows"), MUTANTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_gradient_mutant_is_rejected(spreads, plan, workload_id, shows):
    errors = gradients_judged(spreads, plan, workload_id)
    assert min(errors[name] for name in shows) > 2, errors
    assert all(error <= 1 for name, error in errors.items() if name not in shows), errors


@pytest.mark.parametrize("plan", FORMS, ids=lambda x: x.__name__)
def test_gradients_of_padded_heads(spreads, plan, monkeypatch):
    monkeypatch.setattr(spreads.session, "selection", dataclasses.replace(spreads.session.selection, pad_heads=True))
    errors = gradients_judged(spreads, plan, f"b1-h{spreads.ranks.size + 1}-s96-d32-causal-fp32")
    assert max(errors.values()) <= 1, errors


def test_a_gather_in_chunks_has_no_backward_of_its_own(spreads):
    with pytest.raises(pytest.skip.Exception, match="its backward pass is that of 'gather'"):
        gradients_judged(spreads, GatherOverlapped, MHA)
