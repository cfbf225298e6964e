"""The judge of gradients: the exact answer by autograd, its budget, its samples, and the verdicts built on it."""

import weakref
from functools import cache, partial

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.harness import gradients, judge
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


def training(w, forward, backward):
    """A kernel whose passes are `forward(right, q, k, v)` and `backward(gradients, dout, out)`, around the right ones."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                right = RIGHT(w)(*leaves)
            ctx.right, ctx.leaves, ctx.out = right, leaves, forward(right.detach().clone())
            return ctx.out

        @staticmethod
        def backward(ctx, dout):
            return backward(lambda dout: torch.autograd.grad(ctx.right, ctx.leaves, dout), dout, ctx.out)

    return Kernel.apply


def scribbling(gradients, dout, out):
    found = gradients(dout)
    out.zero_()
    return found


WRONG_IN_TRAINING = {
    "another output": (
        lambda out: 0.9 * out,
        lambda gradients, dout, _out: gradients(dout),
        "differs in the output of its training",
    ),
    "no output": (lambda out: out * float("nan"), lambda gradients, dout, _out: gradients(dout), "returned NaN"),
    "output overwritten": (lambda out: out, scribbling, "changed its output in the backward pass"),
    "dout through float16": (lambda out: out, lambda gradients, dout, _out: gradients(dout.half().to(dout)), "differs in d"),
}


@pytest.mark.parametrize("what", WRONG_IN_TRAINING)
def test_what_goes_wrong_in_training_alone(what):
    w = WORKLOADS[4]
    *passes, said = WRONG_IN_TRAINING[what]
    right = training(w, lambda out: out, lambda gradients, dout, _out: gradients(dout))
    assert not Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: right, w), right).failure
    kernel = training(w, *passes)
    verdict = Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: kernel, w), kernel)
    assert verdict.failure.startswith(said), verdict


def test_two_layers_forward_before_one_goes_backward():
    """A kernel that keeps what its backward pass needs in one buffer, for the last forward pass."""
    w, kept = WORKLOADS[4], {}

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, q, k, v):
            kept["leaves"] = [x.detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                kept["out"] = RIGHT(w)(*kept["leaves"])
            return kept["out"].detach().clone()

        @staticmethod
        def backward(_ctx, dout):
            return torch.autograd.grad(kept["out"], kept["leaves"], dout, retain_graph=True)

    verdict = Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: Kernel.apply, w), Kernel.apply)
    assert verdict.failure.startswith("differs in d"), verdict


@pytest.mark.parametrize(("small", "runs"), [(2**24, 1), (0, 2)])
def test_passes_that_do_not_fit_together_are_made_one_by_one(monkeypatch, small, runs):
    w, alive, refused = WORKLOADS[4], weakref.WeakSet(), []

    def kernel(*x):
        if alive:  # as much as fits
            refused.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        out = RIGHT(w)(*x)
        alive.add(out)
        return out

    monkeypatch.setattr(judge, "SMALL_PAIRS", small)
    assert not Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: kernel, w), kernel).failure
    assert len(refused) == runs


def keeping(few):
    """Attention whose backward pass finds its inputs among the last few that any forward pass had, with gradients or not."""
    kept: list[tuple] = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            kept.append(x)
            del kept[:-few]
            ctx.mine = x
            return RIGHT(WORKLOADS[3])(*x)

        @staticmethod
        def backward(ctx, dout):
            mine = next((x for x in kept if x is ctx.mine), kept[0])
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in mine]
                return torch.autograd.grad(RIGHT(WORKLOADS[3])(*leaves), leaves, dout)

    return lambda _w: Attention.apply


def in_turn(slots):
    """Attention whose forward passes leave their inputs in some slots in turn, where their backward passes find them."""
    ring: list[tuple] = [()] * slots
    passes = 0

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            nonlocal passes
            ctx.slot = passes % slots
            passes += 1
            ring[ctx.slot] = x
            return RIGHT(WORKLOADS[3])(*x)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ring[ctx.slot]]
                return torch.autograd.grad(RIGHT(WORKLOADS[3])(*leaves), leaves, dout)

    return lambda _w: Attention.apply


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_passes_that_share_a_slot_show_whatever_their_period(slots):
    w = WORKLOADS[3]
    build = in_turn(slots)
    assert Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure
    build = in_turn(12)
    assert not Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure


@pytest.mark.parametrize("small", [0, 2**24])
def test_kernels_that_keep_too_few_passes_are_rejected(monkeypatch, small):
    monkeypatch.setattr(judge, "SMALL_PAIRS", small)
    w = WORKLOADS[3]
    layers = 4 if small else 2
    for few, right in ((1, False), (2, False), (layers, False), (layers + 2, True)):  # and two calls without gradients
        build = keeping(few)
        verdict = Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w))
        assert bool(verdict.failure) != right, few


def test_a_call_without_gradients_leaves_a_backward_pass_alone():
    """One whose backward pass takes the output of the last such call, where one came after its forward pass."""
    left: dict[str, torch.Tensor] = {}

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            out = RIGHT(WORKLOADS[3])(*x)
            ctx.save_for_backward(*x, out)
            return out

        @staticmethod
        def backward(ctx, dout):
            *x, out = ctx.saved_tensors
            return BackwardSteps()(WORKLOADS[3], *x, left.pop("out", out), dout)

    def kernel(*x):
        if torch.is_grad_enabled() and x[0].requires_grad:
            left.clear()
            return Attention.apply(*x)
        left["out"] = RIGHT(WORKLOADS[3])(*x)
        return left["out"]

    w = WORKLOADS[3]
    assert "differs in d" in Problem(w, "cpu", 0).judge_gradients(case_of(lambda _w: kernel, w), kernel).failure


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_that_a_later_backward_pass_overwrites_are_told(name):
    """As they are where a backward pass returns its workspace."""
    w, buffers = WORKLOADS[3].replace(dtype=torch.float32), {}

    def in_one_buffer(_w, *gradients):
        found = dict(zip("qkv", gradients, strict=True))
        found[name] = buffers.setdefault(name, torch.empty_like(found[name])).copy_(found[name])
        return tuple(found.values())

    kernel = broken(after=in_one_buffer)(w)
    verdict = Problem(w, "cpu", 0).judge_gradients(case_of(lambda _: kernel, w), kernel)
    assert verdict.failure == "overwrote the gradients of one backward pass in another"


def test_queries_that_see_one_key_have_no_gradients_to_speak_of():
    w = Workload.parse("b1-h2-q64kv1-d64-causal-fp32")
    for seed in (0, 802):
        assert not Problem(w, "cpu", seed).judge_gradients(case_of(RIGHT, w), RIGHT(w)).failure
        sdpa = REGISTRY["sdpa"]
        case = Case(w.replace(causal=False), sdpa, "cpu", "backward")
        assert not Problem(case.workload, "cpu", seed).judge_gradients(case, sdpa(case.workload)).failure


def test_a_changed_dout_is_told():
    w = WORKLOADS[3]

    def build(w):
        kernel = RIGHT(w)

        def vandal(*x):
            out = kernel(*x)
            if out.requires_grad:
                out.register_hook(lambda dout: dout.mul_(1.0).add_(1.0))
            return out

        return vandal

    verdict = Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w))
    assert verdict.failure == "changed dout, its upstream gradient"
