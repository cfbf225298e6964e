"""The budget of each row: honest kernels stay within it and mutants do not, on every kind of workload in every dtype."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from plain_attention import attend, right, scores

from attn_impls import Workload
from attn_impls.harness import inputs, oracle

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOADS = [
    f"{text}-{dtype}"
    for text in (
        "b2-h4-s128-d64",
        "b1-h6kv3-s195-d64-causal",
        "b2-h4kv2-q70kv200-d64v32-causal-win70",
        "b1-h4kv2-s130-d64-causal-cap20-scale36",
        "b8-h4kv2-q1kv320-d64-causal",
        "b1-h3-q140kv70-d64-causal",  # blind rows
    )
    for dtype in ("bf16", "fp16", "fp32")
]


@cache
def known(text: str) -> SimpleNamespace:
    """A workload, its needles, its plain inputs, and what the oracle says of each."""
    w = Workload.parse(text)
    needles, plain = inputs.needles(w, "cpu", 2), inputs.plain(w, "cpu", 2)
    return SimpleNamespace(
        w=w,
        needles=needles,
        plain=plain,
        exposed=oracle.reference(w, needles),
        ordinary=oracle.reference(w, plain),
        right=attend(w, needles).to(w.dtype),
    )


def scale_first(w, x):
    return attend(w, x._replace(q=x.q.float() * w.scale), factor=math.sqrt(w.scale_dim))


def rounded_weights(w, x):
    """softmax to the workload's dtype, then the product with V."""
    weights = attend(w, x._replace(v=torch.eye(w.kv_len).expand(w.batch, w.kv_heads, -1, -1)))
    return weights.to(w.dtype).float() @ x.v.float().repeat_interleave(w.group, 1)


def flash(w, x):
    """Online softmax over 64-key tiles, unnormalised weights rounded to the workload's dtype (FlashAttention-2)."""
    q, k, v = x.q.float(), x.k.float().repeat_interleave(w.group, 1), x.v.float().repeat_interleave(w.group, 1)
    most = torch.full((w.batch, w.heads, w.q_len, 1), -1e30)
    total, out = torch.zeros_like(most), torch.zeros(w.shapes()["out"])
    i = torch.arange(w.q_len)[:, None] + w.offset
    for start in range(0, w.kv_len, 64):
        tile = slice(start, start + 64)
        s = q @ k[:, :, tile].mT * w.scale
        if w.softcap:
            s = torch.tanh(s / w.softcap) * w.softcap
        if w.causal:
            s = s.masked_fill(~right(w, i, torch.arange(w.kv_len)[tile]), -math.inf)
        before, most = most, torch.maximum(most, s.amax(-1, keepdim=True))
        weights, shrink = torch.exp(s - most), torch.exp(before - most)
        out, total = out * shrink + weights.to(w.dtype).float() @ v[:, :, tile], total * shrink + weights.sum(-1, keepdim=True)
    return out / total.clamp(min=1e-30)


def by_lse(splits):
    """Weights as exp(score − lse) of each split, whose outputs are merged by their lse."""

    def kernel(w, x):
        v = x.v.float().repeat_interleave(w.group, 1)
        found = scores(w, x)
        outs, lses = [], []
        for part, values in zip(found.tensor_split(splits, -1), v.tensor_split(splits, -2), strict=True):
            lses.append(part.logsumexp(-1, keepdim=True).clamp(min=-1e30))
            outs.append(torch.exp(part - lses[-1]) @ values)
        shares = torch.exp(torch.stack(lses) - torch.stack(lses).logsumexp(0))
        blind = ~found.isfinite().any(-1, keepdim=True)
        return (shares * torch.stack(outs)).sum(0).masked_fill(blind, 0.0)

    return kernel


HONEST = {
    "in float64": lambda w, x: attend(w, x, torch.float64),
    "in float32": attend,
    "in its dtype": lambda w, x: attend(w, x, w.dtype),
    "scale first": scale_first,
    "head dim summed backwards": lambda w, x: attend(w, x._replace(q=x.q.flip(-1), k=x.k.flip(-1))),
    "rounded weights": rounded_weights,
    "flash": flash,
    "by its lse": by_lse(1),
    "splits by their lse": by_lse(5),
}


@pytest.mark.parametrize("kernel", HONEST)
@pytest.mark.parametrize("text", WORKLOADS)
def test_honest_kernels_pass(text, kernel):
    k = known(text)
    assert k.exposed.over_budget(HONEST[kernel](k.w, k.needles).to(k.w.dtype)) <= 1
    assert k.ordinary.over_budget(HONEST[kernel](k.w, k.plain).to(k.w.dtype)) <= 1


def tiles(w: Workload) -> int:
    return math.ceil(w.kv_len / 64)


def mutant(**wrong):
    return lambda w, x, dtype: attend(w, x, dtype, **wrong)


def spoilt(spoil):
    return lambda w, x, dtype: spoil(w, attend(w, x, dtype))


def one_value(value: float):
    def spoil(_, out):
        out[0, -1, -1, 0] = value
        return out

    return spoilt(spoil)


MUTANTS = {
    "first 64-key tile dropped": mutant(dropped=(0,)),
    "middle 64-key tile dropped": lambda w, x, dtype: attend(w, x, dtype, dropped=(tiles(w) // 2,)),
    "last 64-key tile dropped": lambda w, x, dtype: attend(w, x, dtype, dropped=(tiles(w) - 1,)),
    "128-key tile dropped": lambda w, x, dtype: attend(w, x, dtype, dropped=(tiles(w) - 2, tiles(w) - 1)),
    "scale × 1.02": mutant(factor=1.02),
    "scale ÷ 1.02": mutant(factor=1 / 1.02),
    "scale 1/d": lambda w, x, dtype: attend(w, x, dtype, factor=w.scale),
    "scale from the head dim": lambda w, x, dtype: attend(w, x, dtype, factor=math.sqrt(w.scale_dim / w.head_dim)),
    "mask missing": mutant(sees=lambda _, i, j: (j >= 0) & (i == i)),
    "mask one key more": mutant(sees=lambda w, i, j: right(w, i, j) | (j == i + 1)),
    "mask one key less": mutant(sees=lambda w, i, j: right(w, i, j) & (j != i)),
    "mask top-left": mutant(sees=lambda w, i, j: right(w, i - w.offset, j)),
    "window missing": mutant(sees=lambda _, i, j: j <= i),
    "window one key more": mutant(sees=lambda w, i, j: right(w, i, j) | ((j == i - w.window) & (w.window > 0))),
    "window one key less": mutant(sees=lambda w, i, j: right(w, i, j) & ((j != i - w.window + 1) | (w.window == 0))),
    "softcap missing": mutant(cap=False),
    "GQA map h % kv": mutant(kv_head=lambda w, h: h % w.kv_heads),
    "GQA map of a neighbour": mutant(kv_head=lambda w, h: min(h // w.group + 1, w.kv_heads - 1)),
    "two heads swapped": spoilt(lambda w, out: out[:, [1, 0, *range(2, w.heads)]]),
    "batch mixed up": spoilt(lambda _, out: out.roll(1, 0)),
    "last partial tile unwritten": spoilt(lambda w, out: out * (torch.arange(w.q_len) < w.q_len // 64 * 64)[:, None]),
    "one NaN": one_value(math.nan),
    "one infinity": one_value(-math.inf),
    "one value doubled": spoilt(lambda _, out: torch.where(out == out[:, :, -1:].abs().max(), 2 * out, out)),
    "zeros": spoilt(lambda _, out: torch.zeros_like(out)),
    "mean of V": lambda w, x, dtype: attend(w, x._replace(q=torch.zeros_like(x.q)), dtype),
}


@pytest.mark.parametrize("mutation", MUTANTS)
@pytest.mark.parametrize("text", WORKLOADS)
def test_mutants_are_rejected_wherever_they_differ(text, mutation):
    k = known(text)
    in_float64 = MUTANTS[mutation](k.w, k.needles, torch.float64)
    differs = not torch.allclose(in_float64, k.exposed.out, rtol=1e-9, atol=1e-9)
    out = k.right if not differs else MUTANTS[mutation](k.w, k.needles, torch.float32).to(k.w.dtype)
    assert (k.exposed.over_budget(out) > 1) == differs


@pytest.mark.parametrize("mutation", MUTANTS)
def test_every_mutant_applies_somewhere(mutation):
    cases = [known(text) for text in WORKLOADS if text.endswith("bf16")]
    assert any(not torch.allclose(MUTANTS[mutation](k.w, k.needles, torch.float64), k.exposed.out) for k in cases)


def test_errors_are_measured_in_budgets():
    k = known("b2-h4-s128-d64-bf16")
    direction = torch.nn.functional.normalize(torch.randn(k.exposed.out.shape, dtype=torch.float64), dim=-1)
    allowed = (k.exposed.budget * k.exposed.norm)[..., None] * direction
    assert k.exposed.over_budget(k.exposed.out + 0.5 * allowed) == pytest.approx(0.5)
    assert k.exposed.rms_over_budget(k.exposed.out + 0.5 * allowed) == pytest.approx(0.5)
    apart = k.exposed.apart(k.exposed.out + 0.5 * allowed, k.exposed.out - allowed, k.exposed)
    assert apart == pytest.approx(0.75)  # of both budgets
    one_row = allowed * (torch.arange(128) == 77)[:, None]
    assert k.exposed.over_budget(k.exposed.out + 7 * one_row) == pytest.approx(7)
    assert k.exposed.rms_over_budget(k.exposed.out + 7 * one_row) == pytest.approx(7 / math.sqrt(128))
    assert k.exposed.over_budget(torch.full_like(k.exposed.out, math.nan)) == math.inf
    assert k.exposed.apart(k.exposed.out, torch.full_like(k.exposed.out, math.inf), k.exposed) == math.inf


def test_rows_may_not_all_be_off_the_same_way():
    k = known("b1-h6kv3-s195-d64-causal-bf16")
    for factor in (0.995, 1.005):
        out = factor * k.ordinary.out
        assert k.ordinary.over_budget(out) <= 1  # no row of its own shows it
        assert k.ordinary.drift_over_budget(out) > 1
    one_row = torch.arange(195)[:, None] == 77
    assert k.ordinary.drift_over_budget(torch.where(one_row, 1.005 * k.ordinary.out, k.ordinary.out)) <= 1
    assert k.ordinary.drift_over_budget(torch.full_like(k.ordinary.out, math.nan)) == math.inf


def test_blind_rows_are_judged_by_the_size_of_the_others():
    k = known("b1-h3-q140kv70-d64-causal-bf16")
    out = k.right.clone()
    assert out[:, :, : k.w.blind_rows].count_nonzero() == 0
    out[0, 0, 0, 0] = 1e-6 * inputs.LOUD
    assert k.exposed.over_budget(out) <= 1
    out[0, 0, 0, 0] = inputs.LOUD
    assert k.exposed.over_budget(out) > 1
