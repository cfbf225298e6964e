"""The backward pass on several ranks where one rank alone cannot do the whole problem's."""

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.harness import spread_backward
from attn_impls.harness.case import Case
from attn_impls.harness.judge import Problem
from attn_impls.harness.sharded import Trial
from attn_impls.parallel import Form, Spread
from attn_impls.parallel.tensor import Core
from attn_impls.registry import REGISTRY, discover


class OneRank:
    size = 1

    def exchange(self, value):
        return [value]

    def guarded(self, _what, action, collective=False):  # noqa: ARG002
        return action()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_, q):
        return q.clone()

    @staticmethod
    def backward(_, __):
        raise Unsupported("no backward beyond 4 heads\nand more words")


def whole(kernel, limited):
    return (lambda q, k, v: kernel(NoBackward.apply(q), k, v)) if limited else kernel


@pytest.mark.parametrize("limited", [True, False])
def test_the_parts_are_timed_where_the_whole_has_no_backward(limited):
    discover()
    w, implementation = Workload.parse("b1-h4-s16-d16-fp32"), REGISTRY["sdpa-math"]
    case, problem = Case(w, implementation, "cpu", "backward"), Problem(w, "cpu", 0)
    plan = Core(Spread(w, implementation, "cpu", 0, 1, implementation))
    trial = Trial(OneRank(), case, Form("core", Core), problem, plan, whole(implementation(w), limited), {})
    calls, verdict = spread_backward.prepare(trial)
    assert verdict.failure == ""
    assert set(calls) == {"ranks"} | (set() if limited else {"one rank"})
    assert verdict.alone_missing == ("no backward beyond 4 heads" if limited else "")
    assert (verdict.unsharded_error_over_budget is None) == limited
