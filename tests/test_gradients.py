"""The judge of gradients: the exact answer by autograd, its budget, its samples, and the verdicts built on it."""

from functools import cache, partial

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.harness import gradients
from attn_impls.harness.backward_steps import BackwardSteps, broken
from attn_impls.harness.case import Case
from attn_impls.harness.gradient_mutants import GRADIENT_MUTANTS
from attn_impls.harness.inputs import Inputs, needles, plain
from attn_impls.harness.judge import Problem
from attn_impls.harness.mutation import WORKLOADS, GradientBench
from attn_impls.harness.steps import Steps
from attn_impls.registry import REGISTRY, Implementation, discover

pytestmark = pytest.mark.usefixtures("one_thread")

discover()
FEW = [w for w in WORKLOADS if w.softcap or w.window or w.blind_rows or w.offset > 0 or w.v_head_dim != w.head_dim]
SOME = [
    w for w in FEW if w.softcap or w.blind_rows or 1 < w.q_len <= 16
]  # on which each mutant shows that does on any of the few
RIGHT = broken()


def by_autograd(w: Workload, x: Inputs, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Float64 gradients of attention written out once more, whole and without blocks."""
    q, k, v = (t.double().requires_grad_() for t in x)
    scores = q @ k.repeat_interleave(w.group, 1).mT * w.scale
    scores = w.softcap * torch.tanh(scores / w.softcap) if w.softcap else scores
    mask = w.mask("cpu")
    scores = scores if mask is None else scores.masked_fill(~mask, -1e300)
    weights = torch.softmax(scores, -1)
    weights = weights if mask is None else weights * mask.any(-1, keepdim=True)
    return torch.autograd.grad(weights @ v.repeat_interleave(w.group, 1), (q, k, v), dout.double())


@pytest.mark.parametrize("w", WORKLOADS, ids=str)
@pytest.mark.parametrize("make", [needles, pytest.param(plain, marks=pytest.mark.slow)])
def test_the_reference_is_autograds(w, make, monkeypatch):
    x, dout = make(w, "cpu", 1), gradients.upstream(w, "cpu", 0)
    whole = gradients.reference(w, x, dout)
    monkeypatch.setattr(gradients, "CHUNK_BYTES", w.group * w.kv_len * 8 * 7)  # blocks of 7 rows
    for known in (whole, gradients.reference(w, x, dout)):
        for name, right in zip("qkv", by_autograd(w, x, dout), strict=True):
            torch.testing.assert_close(known[name].out, right, rtol=1e-9, atol=1e-9 * float(right.abs().max()))


class ByLse(torch.autograd.Function):
    """Attention whose weights, forward and backward, are exp(score − lse) in float32."""

    STEPS = {"weights": lambda _w, scores: torch.exp(scores - scores.logsumexp(-1, keepdim=True).clamp(min=-1e30))}

    @staticmethod
    def forward(ctx, w, *x):
        ctx.w, out = w, Steps(**ByLse.STEPS)(w, *x)
        ctx.save_for_backward(*x, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        return None, *BackwardSteps(**ByLse.STEPS)(ctx.w, *ctx.saved_tensors, dout)


ONE_QUERY = Workload.parse("b1-h6kv2-q1kv128-d44v80-causal-fp32")  # whose rows of dk share one δ


@pytest.mark.parametrize("w", [ONE_QUERY, *(w.replace(dtype=torch.float32) for w in WORKLOADS)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_by_the_lse_are_within_what_float32_excuses(w, seed):
    kernel = partial(ByLse.apply, w)
    problem = Problem(w, "cpu", seed)
    verdict = problem.judge_gradients(case_of(lambda _: kernel, w), kernel)
    assert not verdict.failure
    assert not problem.judge(Case(w, Implementation("mine", lambda _: kernel), "cpu"), kernel).failure


@pytest.mark.parametrize("text", ["b1-h6kv2-q1kv128-d64-bf16", "b1-h8-q4kv300-d64-bf16"])
def test_one_percent_too_much_shows_with_few_queries(text):
    w = Workload.parse(text)
    kernel = broken(after=lambda _w, dq, dk, dv: (dq, dk * 1.01, dv))(w)
    assert "all a little off" in Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: kernel, w), kernel).failure


def test_a_sample_of_kv_heads_equals_the_whole(monkeypatch):
    w = Workload.parse("b2-h12kv6-s40-d16-causal-bf16")
    x, dout = plain(w, "cpu", 0), gradients.upstream(w, "cpu", 0)
    monkeypatch.setitem(gradients.MAX_PAIRS, "cpu", 3 * w.batch * w.group * w.q_len * w.kv_len)
    heads = gradients.sample_kv_heads(w, "cpu")
    assert heads == [0, 2, 5]
    assert gradients.query_heads(w, heads) == [0, 1, 4, 5, 10, 11]
    part, whole = gradients.reference(w, x, dout, heads), gradients.reference(w, x, dout)
    assert torch.equal(part["k"].out, whole["k"].out[:, heads])
    assert torch.equal(part["q"].out, whole["q"].out[:, gradients.query_heads(w, heads)])
    problem = Problem(w, "cpu", 0)
    assert problem.judge_gradients(case_of(RIGHT, w), RIGHT(w)).failure == ""


def case_of(build, w, **options) -> Case:
    return Case(w, Implementation("mine", build, **options), "cpu", "backward")


@cache
def problem_of(w: Workload) -> Problem:
    return Problem(w, "cpu", 0)


QUICK = {(name, torch.bfloat16) for name in ("sdpa", "sdpa-math", "sdpa-flash")}
QUICK |= {("sdpa", dtype) for dtype in (torch.float16, torch.float32)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else [pytest.mark.slow])
        for name in ("handcrafted", "sdpa", "sdpa-math", "sdpa-flash")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ],
    ids=str,
)
def test_honest_kernels_pass(name, dtype):
    tried = 0
    for w in WORKLOADS:
        w = w.replace(dtype=dtype)
        try:
            kernel = REGISTRY[name](w)
            verdict = problem_of(w).judge_gradients(Case(w, REGISTRY[name], "cpu", "backward"), kernel)
        except Unsupported:
            continue
        tried += 1
        assert not verdict.failure, w
        assert set(verdict.by_gradient) == {"dq", "dk", "dv"}
        assert max(verdict.by_gradient.values()) == verdict.error_over_budget
    assert tried >= 4  # 5, and 4 with torch 2.5


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_both_layouts(layout):
    w = WORKLOADS[4]

    def build(w):
        kernel = RIGHT(w)
        return kernel if layout == "bhsd" else lambda *x: kernel(*(t.transpose(1, 2) for t in x)).transpose(1, 2)

    verdict = Problem(w, "cpu", 0).judge_gradients(case_of(build, w, layout=layout), build(w))
    assert (verdict.failure, verdict.bitwise_repeatable) == ("", True)


@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_rejected_exactly_where_they_differ(mutant):
    assert_rejected(mutant, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_rejected_in_every_dtype(mutant, dtype):
    assert_rejected(mutant, [w.replace(dtype=dtype) for w in FEW])


@cache
def bench_of(w: Workload) -> GradientBench:
    return GradientBench(w, "cpu")


def assert_rejected(mutant, workloads):
    applied = 0
    for w in workloads:
        bench = bench_of(w)
        wrong = bench.differs(mutant)
        if wrong and mutant.shows and not mutant.shows(w):
            continue  # rounding that the dtype excuses may pass or not
        verdict = bench.judge(mutant)
        assert bool(verdict.failure) == wrong, (w, verdict)
        applied += wrong
    assert applied or mutant.shows


def test_the_worst_gradient_is_named():
    w = WORKLOADS[3]
    mutant = next(mutant for mutant in GRADIENT_MUTANTS if mutant.name == "zero dV")
    verdict = GradientBench(w, "cpu").judge(mutant)
    assert verdict.failure.startswith("differs in dv from the float64 oracle")
    assert verdict.by_gradient["dv"] > 50 > 1 > verdict.by_gradient["dq"]
    assert verdict.sdpa_failure.startswith("differs in dv from SDPA")


def test_queries_that_see_one_key_have_no_gradients_to_speak_of():
    w = Workload.parse("b1-h2-q64kv1-d64-causal-fp32")
    for seed in (0, 802):
        assert not Problem(w, "cpu", seed).judge_gradients(case_of(RIGHT, w), RIGHT(w)).failure
        sdpa = REGISTRY["sdpa"]
        case = Case(w.replace(causal=False), sdpa, "cpu", "backward")
        assert not Problem(case.workload, "cpu", seed).judge_gradients(case, sdpa(case.workload)).failure
