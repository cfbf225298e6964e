"""The probe of company: kernels that do not keep the sizes and options that they were built with."""

import re

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.harness import probes
from attn_impls.harness.mutants import broken
from attn_impls.registry import Implementation

KEPT = next(asked for asked in probes.PROBES if asked.name == "options kept")


def of_the_last_build():
    """Kernels whose options lie in one place."""
    built: list[Workload] = []

    def build(w):
        built.append(w)
        return lambda q, k, v: broken()(built[-1])(q, k, v)

    return build


def of_the_first_build():
    """Kernels kept by sizes and mask, as a cache of plans is."""
    built: dict[tuple, Workload] = {}
    return lambda w: broken()(built.setdefault((*w.shapes().values(), w.causal, w.window), w))


def of_the_last_length():
    """Kernels that see as many keys as the last one was built for."""
    built: list[int] = []

    def build(w):
        built.append(w.kv_len)
        return lambda q, k, v: broken()(w)(q, k, v * (torch.arange(w.kv_len, device=v.device) < built[-1])[:, None])

    return build


def of_the_last_forward_pass():
    """A backward pass that finds its options where the last forward pass left them."""
    called: list[Workload] = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, q, k, v):
            called.append(w)
            ctx.save_for_backward(q, k, v)
            return broken()(w)(q, k, v)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return None, *torch.autograd.grad(broken()(called[-1])(*leaves), leaves, dout)

    return lambda w: lambda q, k, v: Attention.apply(w, q, k, v)


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (of_the_last_build, r"its output is off by \d+% .* with b1-h4kv2-s76-d64-causal-win4-bf16 beside .*-win12-bf16"),
        (of_the_first_build, r"its output is off by \d+% .* with b1-h3-s80-d64-scale50-bf16 beside .*-scale144-bf16"),
        (of_the_last_length, r"its output is off by \d+% .* with b1-h3-s200-d64-causal-bf16 beside .*-s100-.*"),
        (of_the_last_forward_pass, r"dq is off by .* with .*-win12-bf16 where .*-win4-bf16 ran before its backward pass"),
    ],
)
def test_kernels_keep_the_options_they_were_built_with(suite, build, found):
    text = probes.answer(KEPT, Implementation("forgetful", build()), suite.device)
    assert re.fullmatch(f"wrong: {found}", text), text
    assert "options kept" in probes.objection({KEPT.name: text})
    assert not KEPT.concerns(KEPT.workload)  # what is timed is judged by itself


@pytest.mark.parametrize(
    ("key", "kept_wrong"),
    [
        (lambda w: (w.replace(head_dim=1, v_head_dim=1, scale_dim=1), w.scale_dim / w.head_dim), "b1-h4kv2-s52-d128-causal-bf16"),
        (lambda w: w.replace(dtype=torch.bfloat16), "b1-h3-s54-d64-causal-fp32"),
        (lambda w: w.replace(kv_len=-(-w.kv_len // 64) * 64) if w.q_len == 1 else w, "b2-h4kv2-q1kv267-d64-causal-bf16"),
    ],
    ids=["head dim", "dtype", "length"],
)
def test_plans_kept_by_too_little_are_told(suite, key, kept_wrong):
    """Plans that bake in the scale, the dtype and the length of the workload that they were first made for."""
    built: dict[object, Workload] = {}

    def build(w):
        first = built.setdefault(key(w), w)

        def kernel(q, k, v):
            v = v * (torch.arange(w.kv_len, device=v.device) < first.kv_len)[:, None]
            out = broken()(w.replace(scale_dim=first.scale_dim))(*(t.to(first.dtype) for t in (q, k, v)))
            return out.to(q.dtype)

        return kernel

    text = probes.answer(KEPT, Implementation("frugal", build), suite.device)
    assert re.fullmatch(rf"wrong: its output is off by \d+% .* with {kept_wrong} .*", text), text


def test_options_that_cannot_be_had_are_not_asked(suite):
    def plain_only(w):
        if w.causal or w.softcap or w.scale_dim != w.head_dim or w.q_len != w.kv_len:
            raise Unsupported("no options")
        return broken()(w)

    def causal_only(w):
        if w.window or w.softcap or w.scale_dim != w.head_dim:
            raise Unsupported("causal alone")
        return broken()(w)

    assert probes.answer(KEPT, Implementation("plain", plain_only), suite.device) == "unsupported: none of the options"
    assert probes.answer(KEPT, Implementation("causal", causal_only, backward=False), suite.device) == "ok"
