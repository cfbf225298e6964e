"""What goes wrong in training alone: several forward passes before a backward pass, what is kept for it, and what it changes."""

import weakref

import pytest
import torch
from test_gradients import RIGHT, case_of

from attn_impls.harness import judge
from attn_impls.harness.backward_steps import BackwardSteps, broken
from attn_impls.harness.judge import Problem
from attn_impls.harness.mutation import WORKLOADS
from attn_impls.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")


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


def in_turn(slots, w=WORKLOADS[3]):
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
            return RIGHT(w)(*x)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ring[ctx.slot]]
                return torch.autograd.grad(RIGHT(w)(*leaves), leaves, dout)

    return lambda _w: Attention.apply


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_passes_that_share_a_slot_show_whatever_their_period(slots):
    w = WORKLOADS[3]
    build = in_turn(slots)
    assert Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure
    build = in_turn(12)
    assert not Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure


@pytest.mark.parametrize("slots", [6, 8, 12, 14])
def test_passes_that_share_a_slot_of_many_show_on_a_tiny_workload(slots):
    w = Workload.parse("b2-h4kv2-q3kv7-d64-causal-fp32")
    build = in_turn(slots, w)
    assert Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure
    build = in_turn(24, w)
    assert not Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure


def on_a_stack(w):
    """Attention whose forward passes push their inputs on a stack, from which backward passes take them."""
    stack: list[tuple] = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, *x):
            if any(tensor.requires_grad for tensor in x):
                stack.append(x)
            return RIGHT(w)(*x)

        @staticmethod
        def backward(_ctx, dout):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in stack.pop()]
                return torch.autograd.grad(RIGHT(w)(*leaves), leaves, dout)

    return lambda _w: Attention.apply


def test_backward_passes_in_the_order_of_the_forward_passes_show_a_stack_on_a_tiny_workload():
    for w, told in (("b2-h4kv2-q3kv7-d64-causal-fp32", True), ("b2-h4kv2-q60kv70-d64-causal-fp32", False)):
        w = Workload.parse(w)
        build = on_a_stack(w)
        assert bool(Problem(w, "cpu", 0).judge_gradients(case_of(build, w), build(w)).failure) == told


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
