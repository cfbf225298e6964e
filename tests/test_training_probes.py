"""The probes of gradients: douts that lie in memory otherwise, and inputs that want a gradient alone."""

import re

import pytest
import torch
from test_probes import CLOSED

from attn_impls.harness import backward_steps, probes
from attn_impls.harness.mutants import MUTANTS, broken
from attn_impls.registry import Implementation


def careless_with(w, misread):
    """A backward pass that reads some douts' memory in the order of their shape, which is right for a contiguous one alone."""

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                ctx.right = broken()(w)(*ctx.leaves)
            return ctx.right.detach().clone()

        @staticmethod
        def backward(ctx, dout):
            if misread(dout):
                dout = dout.transpose(1, 2).reshape(dout.shape) * torch.arange(dout.shape[-1], device=dout.device)
            return torch.autograd.grad(ctx.right, ctx.leaves, dout)

    return Careless.apply


VIEWS = probes.PROBES[-1]


@pytest.mark.parametrize(
    ("misread", "found"),
    [
        (lambda dout: 0 in dout.stride(), "is one value, expanded"),
        (lambda dout: dout.stride(2) > dout.stride(3) * dout.shape[3], "is a part of a wider tensor"),
        (lambda dout: dout.stride(2) > dout.stride(1) > 0, "is a view of another layout"),
        (
            lambda dout: dout.stride(1) > dout.stride(2) * dout.shape[2] and dout.stride(2) == dout.shape[3],
            "is a part of what has more tokens",
        ),
        (
            lambda dout: dout.stride(0) > dout.stride(1) * dout.shape[1] and dout.stride(1) == dout[0, 0].numel(),
            "is a part of what has more heads",
        ),
    ],
)
def test_a_dout_is_read_as_it_lies_in_memory(suite, misread, found):
    careless = Implementation("careless", lambda w: careless_with(w, misread))
    text = probes.answer(VIEWS, careless, suite.device)
    assert re.fullmatch(rf"wrong: dq is off by \d+% of its largest value where dout {found} with b2-h3-s24-d64-bf16", text), text
    assert not any(VIEWS.concerns(w) for w in (VIEWS.workload, *(other.workload for other in CLOSED)))  # shown, and timed


@pytest.mark.parametrize("misread", [lambda w: w.group > 1, lambda w: w.head_dim == 128, lambda w: w.dtype == torch.float32])
def test_a_dout_is_read_so_with_other_options_too(suite, misread):
    def build(w):
        return careless_with(w, lambda dout: misread(w) and not dout.is_contiguous())

    text = probes.answer(VIEWS, Implementation("careless", build), suite.device)
    assert re.fullmatch(r"wrong: dq is off by \d+% .* where dout is one value, expanded with b2-h4kv2-.*", text), text
    assert probes.answer(VIEWS, Implementation("careless", build, compiles="seconds"), suite.device) == "ok"


TRAINING = next(asked for asked in probes.PROBES if asked.name == "gradients")


def detached(name):
    """A kernel whose output carries no gradient unless this one input wants one."""

    def kernel(w):
        def call(*x):
            out = broken()(w)(*x)
            return out if x["qkv".index(name)].requires_grad else out.detach()

        return call

    return kernel


def all_or_nothing(w):
    """dk is computed only where dq is."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return broken()(w)(q, k, v)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                dq, dk, dv = torch.autograd.grad(broken()(w)(*leaves), leaves, dout)
            return dq, dk if ctx.needs_input_grad[0] else torch.zeros_like(dk), dv

    return Attention.apply


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (detached("q"), "its output carries no gradient where only k may have one with b2-h6kv2-s36-.*"),
        (detached("k"), "its output carries no gradient where only q may have one with .*"),
        (all_or_nothing, r"dk is off by 100% of its largest value where only k may have gradients with .*"),
        (
            lambda w: backward_steps.broken(weights=lambda _w, s: (s * 2).softmax(-1) if w.window else s.softmax(-1))(w),
            r"dq is off by \d+% of its largest value with b1-h3-s48-d64-causal-win4-bf16",
        ),
        (
            backward_steps.broken(dout=lambda _w, dout: dout / dout.abs().amax() * dout.abs().amax()),
            "its gradients are not 0 where dout is with .*",
        ),
    ],
)
def test_wrong_gradients_are_told(suite, build, found):
    text = probes.answer(TRAINING, Implementation("careless", build), suite.device)
    assert re.fullmatch(f"wrong: {found}", text), text
    assert not TRAINING.concerns(TRAINING.workload)


def test_wanted_gradients_are_asked_with_all_options_of_what_does_not_compile(suite):
    def build(w):
        return all_or_nothing(w) if w.softcap else broken()(w)

    text = probes.answer(TRAINING, Implementation("careless", build), suite.device)
    assert text == "wrong: dk is off by 100% of its largest value where only k may have gradients with b1-h3-s48-d64-cap2-bf16"
    assert probes.answer(TRAINING, Implementation("careless", build, compiles="seconds"), suite.device) == "ok"


def test_who_has_no_gradients_or_wrong_outputs_is_not_asked_for_them(suite):
    wrong = next(mutant.build for mutant in MUTANTS if mutant.name == "scale 1")
    assert probes.answer(TRAINING, Implementation("wrong", wrong), suite.device) == "unsupported: wrong outputs"
    for options in ({"backward": False}, {"approximate": "int8"}):
        for asked in (TRAINING, probes.PROBES[-1]):
            text = probes.answer(asked, Implementation("forward", broken(), **options), suite.device)
            assert text == "unsupported: forward only, or approximate"
