"""Workloads, kernels of both layouts, and the judgement on a plan class, for the tests of ways to share out attention."""

from attn_impls import Workload
from attn_impls.harness import spread_forward
from attn_impls.harness.case import Case
from attn_impls.harness.judge import Problem
from attn_impls.parallel import Form
from attn_impls.registry import REGISTRY, Implementation, discover

MHA = "b1-h8-s96-d32-causal-fp32"
GQA = "b2-h16kv8-s96-d32-causal-fp32"
FEW_KV = "b1-h16kv2-s96-d32-causal-fp32"
SHARED_KV = "b1-h8kv1-s96-d32-fp32"  # one KV head on all ranks


def _transposed(w):
    """SDPA's math backend on the layout of the flash-attn libraries."""
    kernel = REGISTRY["sdpa-math"](w)
    return lambda q, k, v: kernel(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2).contiguous()


IMPLEMENTATIONS = {
    "bhsd": lambda: REGISTRY["sdpa-math"],
    "bshd": lambda: Implementation("sdpa-math-bshd", _transposed, layout="bshd"),
}


def _trial(spreads, plan, identity, layout):
    discover()
    w, device = Workload.parse(identity), spreads.session.device
    return Case(w, IMPLEMENTATIONS[layout](), device), Form(plan.__name__, plan), Problem(w, device, 0)


def judged(spreads, plan, identity, layout="bhsd"):
    """The verdict on a plan class's results for a workload."""
    case, form, problem = _trial(spreads, plan, identity, layout)
    with spreads.session.outcome(case):
        return spread_forward.check(spreads.trial(case, form, problem, alone=False))


def gradients_judged(spreads, plan, identity, layout="bhsd"):
    """The worst row of each gradient of a plan class, over its budget."""
    return spreads.gradient_errors(*_trial(spreads, plan, identity, layout))
