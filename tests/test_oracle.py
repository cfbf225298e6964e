"""The judge itself: the float64 oracle against brute force and SDPA, the budget against honest kernels and mutants, needles."""

import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import tf32
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attn_impls import Unsupported, Workload
from attn_impls.harness import inputs, oracle
from attn_impls.harness.approximate import loosened
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.judge import Problem
from attn_impls.registry import REGISTRY, Implementation

pytestmark = pytest.mark.usefixtures("one_thread")


def right(w: Workload, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """The mask, from a query's own position i and a key's j."""
    return (j <= i) & (j > i - w.window) if w.window else j <= i


def attend(w, x, dtype=torch.float32, *, factor=1.0, sees=right, kv_head=None, cap=True, dropped=()) -> torch.Tensor:
    """Attention in a dtype, written apart from the oracle, with what mutants get wrong as keywords."""
    heads = [kv_head(w, h) if kv_head else h * w.kv_heads // w.heads for h in range(w.heads)]
    q, k, v = x.q.to(dtype), x.k[:, heads].to(dtype), x.v[:, heads].to(dtype)
    scores = q @ k.mT * (factor / math.sqrt(w.scale_dim))
    if w.softcap and cap:
        scores = torch.tanh(scores / w.softcap) * w.softcap
    i, j = torch.arange(w.kv_len - w.q_len, w.kv_len)[:, None], torch.arange(w.kv_len)[None, :]
    visible = sees(w, i, j) if w.causal else (j >= 0).expand(w.q_len, -1)
    for tile in dropped:
        visible = visible & (j // 64 != tile)
    return torch.softmax(scores.masked_fill(~visible, -math.inf), -1).nan_to_num(0.0) @ v


def brute(w: Workload, x: inputs.Inputs) -> torch.Tensor:
    """Attention in Python floats, key by key."""
    q, k, v = (t.tolist() for t in x)
    out = torch.zeros(w.shapes()["out"], dtype=torch.float64)
    for b in range(w.batch):
        for h in range(w.heads):
            g = h // (w.heads // w.kv_heads)
            for i in range(w.q_len):
                own = i + w.kv_len - w.q_len
                first = max(0, own - w.window + 1) if w.window else 0
                seen = range(first, own + 1) if w.causal else range(w.kv_len)
                scores = [sum(x * y for x, y in zip(q[b][h][i], k[b][g][j], strict=True)) * w.scale_dim**-0.5 for j in seen]
                scores = [w.softcap * math.tanh(s / w.softcap) if w.softcap else s for s in scores]
                weights = [math.exp(s - max(scores)) for s in scores]
                for d in range(w.v_head_dim):
                    weighted = sum(p * v[b][g][j][d] for p, j in zip(weights, seen, strict=True))
                    out[b, h, i, d] = weighted / sum(weights) if weights else 0.0
    return out


@pytest.mark.parametrize(
    "text",
    [
        "b2-h2-s5-d4-fp32",
        "b1-h1-s1-d1-fp32",
        "b1-h2-s6-d4-causal-fp32",
        "b1-h4kv2-s5-d4-causal-bf16",
        "b1-h6kv2-q3kv7-d4v2-fp16",
        "b1-h3kv1-q3kv7-d4v6-causal-fp32",
        "b1-h2-q7kv3-d4-causal-fp32",  # blind rows
        "b1-h2-s6-d4-causal-win2-fp32",
        "b1-h2-s6-d4-causal-win1-fp32",
        "b1-h2-q6kv4-d4-causal-win2-fp32",
        "b1-h2-s4-d4-cap0.5-fp32",
        "b1-h2-s4-d4-scale64-fp32",
        "b2-h4kv2-q7kv5-d4v6-causal-win3-cap2-scale9-bf16",
    ],
)
def test_oracle_by_brute_force(text):
    w = Workload.parse(text)
    for x in (inputs.plain(w, "cpu", 1), inputs.needles(w, "cpu", 1)):
        known = oracle.reference(w, x)
        assert known.rows is None
        torch.testing.assert_close(known.out, brute(w, x), rtol=1e-12, atol=1e-12)
        assert bool((known.budget > 0).all())


@pytest.mark.parametrize(
    "text",
    [
        "b2-h4-s96-d64-bf16",
        "b1-h4-s96-d64-causal-fp16",
        "b2-h6kv2-q50kv90-d32v16-causal-fp32",
        "b1-h8kv1-q3kv130-d32-causal-win70-bf16",
        "b1-h4-q90kv40-d32-scale100-fp32",
        "b1-h2-q90kv40-d32-causal-fp32",
    ],
)
def test_oracle_by_sdpa(text):
    w = Workload.parse(text)
    x = inputs.needles(w, "cpu", 0)
    q, k, v = (t.double() for t in x)
    keywords = {"attn_mask": w.mask("cpu"), "scale": w.scale_dim**-0.5, "enable_gqa": True}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = scaled_dot_product_attention(q, k, v, **keywords)
    expected[:, :, : w.blind_rows] = 0
    torch.testing.assert_close(oracle.reference(w, x).out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "text", ["b1-h4kv2-s300-d32-causal-bf16", "b1-h2-q400kv300-d32-causal-win9-fp32", "b2-h2-q300kv65-d32-fp16"]
)
def test_sampled_rows_equal_the_full_computation(monkeypatch, text):
    w = Workload.parse(text)
    x = inputs.needles(w, "cpu", 0)
    full = oracle.reference(w, x)
    monkeypatch.setitem(oracle.MAX_PAIRS, "cpu", 1)
    sampled = oracle.reference(w, x)
    rows = sampled.rows.tolist()
    assert full.rows is None
    assert rows == sorted(set(rows))
    assert 64 <= len(rows) <= 128
    assert {0, w.q_len - 1} <= set(rows)
    assert any({edge - 1, edge} <= set(rows) for edge in range(64, w.q_len, 64))
    assert set(rows) - {n + d for n in range(0, w.q_len + 64, 64) for d in (-1, 0, 1)}  # and some in between
    torch.testing.assert_close(sampled.out, full.out[:, :, rows], rtol=1e-12, atol=1e-12)
    out = attend(w, x).to(w.dtype)
    assert sampled.over_budget(out) <= 1
    out[:, :, rows[len(rows) // 2]] *= 2
    assert sampled.over_budget(out) > 1


def test_as_many_rows_as_fit(monkeypatch):
    w = Workload.parse("b1-h2-s300-d8-bf16")
    monkeypatch.setitem(oracle.MAX_PAIRS, "cpu", 2 * 300 * 300)
    assert oracle.sample_rows(w, "cpu", 0) is None
    monkeypatch.setitem(oracle.MAX_PAIRS, "cpu", 2 * 300 * 200)
    assert 150 <= len(oracle.sample_rows(w, "cpu", 0)) <= 200
    assert torch.equal(oracle.sample_rows(w, "cpu", 0), oracle.sample_rows(w, "cpu", 0))
    assert oracle.sample_rows(w, "cpu", 0).tolist() != oracle.sample_rows(w, "cpu", 1).tolist()


@pytest.mark.parametrize(
    "text", ["b2-h4kv2-s100-d32-causal-bf16", "b3-h2-q40kv90-d16v24-fp32", "b1-h6kv3-q90kv40-d16-causal-fp16"]
)
def test_chunks_change_nothing(monkeypatch, text):
    w = Workload.parse(text)
    x = inputs.needles(w, "cpu", 0)
    whole = oracle.reference(w, x)
    monkeypatch.setattr(oracle, "CHUNK_BYTES", 1)
    chunked = oracle.reference(w, x)
    torch.testing.assert_close(chunked.out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.norm, whole.norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.budget, whole.budget, rtol=0.5, atol=0)  # products of other shapes may round otherwise


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, in elements."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        owned = isinstance(made, torch.Tensor) and made._base is None
        self.numel = max(self.numel, made.untyped_storage().nbytes() // made.element_size() if owned else 0)
        return made


@pytest.mark.parametrize("approximate", [False, "int8"])
def test_a_kv_head_is_not_copied_for_each_query_head_of_its_group(approximate):
    w = Workload.parse("b2-h32kv1-q1kv512-d64-causal-bf16")
    x = inputs.plain(w, "cpu", 0)
    with Largest() as largest:
        loosened(w, x, oracle.reference(w, x), approximate)
    assert 0 < largest.numel < 4 * x.k.numel()


# Honest kernels and mutants, on every workload in every dtype

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
        scores = q @ k[:, :, tile].mT * w.scale
        if w.softcap:
            scores = torch.tanh(scores / w.softcap) * w.softcap
        if w.causal:
            scores = scores.masked_fill(~right(w, i, torch.arange(w.kv_len)[tile]), -math.inf)
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - most), torch.exp(before - most)
        out, total = out * shrink + weights.to(w.dtype).float() @ v[:, :, tile], total * shrink + weights.sum(-1, keepdim=True)
    return out / total.clamp(min=1e-30)


HONEST = {
    "in float64": lambda w, x: attend(w, x, torch.float64),
    "in float32": attend,
    "in its dtype": lambda w, x: attend(w, x, w.dtype),
    "scale first": scale_first,
    "head dim summed backwards": lambda w, x: attend(w, x._replace(q=x.q.flip(-1), k=x.k.flip(-1))),
    "rounded weights": rounded_weights,
    "flash": flash,
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
    out[0, 0, 0, 0] = 1e-6
    assert k.exposed.over_budget(out) <= 1
    out[0, 0, 0, 0] = 1
    assert k.exposed.over_budget(out) > 1


# Needles


def pointed_at(w: Workload, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The needles as [N, 3] (batch · heads + head, query, key), and the mask [Sq, Skv] that they respect."""
    x, plain = inputs.needles(w, "cpu", seed), inputs.plain(w, "cpu", seed)
    assert torch.equal(x.k, plain.k)
    assert torch.equal(x.v, plain.v)
    changed = (x.q != plain.q).any(-1)
    keys = (x.q.float() @ x.k.float().repeat_interleave(w.group, 1).mT).abs().argmax(-1)  # some are sunken
    head, query = changed.flatten(0, 1).nonzero(as_tuple=True)
    mask = w.mask("cpu")
    everything = torch.ones(w.q_len, w.kv_len, dtype=torch.bool)
    return torch.stack([head, query, keys.flatten(0, 1)[head, query]], 1), everything if mask is None else mask


SPREAD = [
    "b1-h2-s512-d64-bf16",
    "b1-h2-s512-d64-causal-bf16",
    "b2-h4-s130-d64-causal-fp16",
    "b1-h4kv2-s300-d128-causal-win100-bf16",
    "b2-h6kv3-q100kv300-d64-causal-fp32",
    "b1-h2-q300kv128-d64-causal-bf16",
    "b1-h16-q16kv512-d64-bf16",
    "b8-h8kv2-q1kv512-d64-causal-bf16",  # decoding: one query a head
    "b8-h9-q1kv576-d64-causal-bf16",
    "b4-h8-q5kv512-d64-bf16",
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", SPREAD)
def test_every_tile_is_pointed_at(text, seed):
    w = Workload.parse(text)
    spots, mask = pointed_at(w, seed)
    seen = mask[spots[:, 1], spots[:, 2]]
    visible = mask.any(0).nonzero()
    assert set((spots[seen, 2] // 64).tolist()) == set((visible // 64).flatten().tolist())


@pytest.mark.parametrize("text", SPREAD)
def test_needles_point_at_what_is_seen_or_at_the_masks_edges(text):
    w = Workload.parse(text)
    spots, mask = pointed_at(w)
    _, query, key = spots.T
    own = query + w.offset
    hidden = ~mask[query, key]
    first_hidden = (key == own + 1) | ((key == own - w.window) & (w.window > 0))
    assert not bool((hidden & ~first_hidden).any())
    assert not w.causal or w.q_len == 1 or bool(hidden.any())
    if w.causal:
        assert bool((key == own).any())  # the last key seen
    if w.window:
        assert bool((key == own - w.window + 1).any())  # the first one
        assert bool((key == own - w.window).any())


@pytest.mark.parametrize("text", SPREAD)
def test_needles_are_some_saturated_and_some_not(text):
    w = Workload.parse(text)
    x = inputs.needles(w, "cpu", 0)
    spots, mask = pointed_at(w)
    weights = attend(w, x._replace(v=torch.eye(w.kv_len).expand(w.batch, w.kv_heads, -1, -1))).flatten(0, 1)
    head, query, key = spots[mask[spots[:, 1], spots[:, 2]]].T
    found = weights[head, query, key]
    assert bool((found > 0.99).any())
    assert bool(((found > 0.2) & (found < 0.9)).any())
    assert 0.01 < len(spots) / (w.batch * w.heads * w.q_len) <= 0.5 or w.q_len < 8  # the others stay ordinary


def scores_of(w: Workload) -> torch.Tensor:
    """The needles' scores, before cap and mask, [B, H, Sq, Skv]."""
    x = inputs.needles(w, "cpu", 0)
    return x.q.double() @ x.k.double().repeat_interleave(w.group, 1).mT * w.scale


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("text", ["b1-h2-s130-d64", "b2-h6kv3-q50kv203-d64-causal", "b4-h4-q1kv512-d128-causal"])
def test_some_needles_tower_out_of_float32s_range(text, dtype):
    w = Workload.parse(f"{text}-{dtype}")
    scores, mask = scores_of(w), w.mask("cpu")
    top = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).topk(2).values
    towers = top[..., 0] > 100
    assert 2 <= int(towers.sum()) <= towers.numel() / 8
    assert bool((top[towers][:, 1] > 100).any())  # its partner: exp overflows for both
    assert bool(((top[..., 0] - top[..., 1])[towers] > 6).all())  # and yet no rounding of the scores matters


def test_the_query_that_sees_one_key_sinks():
    scores = scores_of(Workload.parse("b1-h4-q20kv16-d64-causal-bf16"))[0, :, 4]
    assert bool((scores[::2, 0] < -104).all())
    assert bool((scores[1::2, 0] > -104).all())


def test_with_a_softcap_some_needles_are_told_apart_by_it_alone():
    w = Workload.parse("b1-h4-s128-d64-cap50-bf16")
    raw = scores_of(w)
    top = raw.topk(2).values
    capped = torch.tanh(top / w.softcap) * w.softcap
    pairs = (capped[..., 1] > 0.8 * w.softcap).flatten()
    assert int(pairs.sum()) >= 2
    assert bool(((top[..., 0] - top[..., 1]).flatten()[pairs] > 3 * (capped[..., 0] - capped[..., 1]).flatten()[pairs]).all())
    assert float(raw.max()) < 100


def test_a_sample_of_rows_holds_needles_of_every_tile_and_kind(monkeypatch):
    w = Workload.parse("b1-h2-s2000-d64-causal-bf16")
    monkeypatch.setitem(oracle.MAX_PAIRS, "cpu", 1)
    preferred = inputs.needle_rows(w, 1)
    assert len(preferred) == len(set(preferred.tolist()))
    rows = oracle.sample_rows(w, "cpu", 0, preferred)
    assert len(rows) <= 128
    assert set(preferred[:40].tolist()) <= set(rows.tolist())
    spots = inputs._spots(w, torch.Generator().manual_seed(1))
    sampled = set(rows.tolist())
    kinds = {int(kind) for _, _, row, _, kind, _ in spots if int(row) in sampled}
    assert kinds == {inputs.HALF, inputs.SATURATED, inputs.TOWERING, inputs.SUNKEN}


@pytest.mark.parametrize("make", [inputs.plain, inputs.needles])
def test_inputs_follow_the_seed(make):
    w = Workload.parse("b2-h4kv2-q33kv70-d16v8-causal-bf16")
    one, same, other = make(w, "cpu", 5), make(w, "cpu", 5), make(w, "cpu", 6)
    for name in "qkv":
        tensor = getattr(one, name)
        assert torch.equal(tensor, getattr(same, name))
        assert not torch.equal(tensor, getattr(other, name))
        assert (tuple(tensor.shape), tensor.dtype) == (w.shapes()[name], w.dtype)
        assert tensor.is_contiguous()


def test_needles_move_with_the_seed():
    w = Workload.parse("b1-h2-s128-d64-bf16")
    assert torch.equal(pointed_at(w, 0)[0], pointed_at(w, 0)[0])
    assert pointed_at(w, 0)[0][:, :2].tolist() != pointed_at(w, 1)[0][:, :2].tolist()


@pytest.mark.parametrize("text", ["b1-h4-s256-d1-fp16", "b1-h4-s256-d2-fp16", "b1-h4-s256-d8-causal-cap1-fp16"])
def test_needles_stay_finite_in_the_smallest_head_dims(text):
    w = Workload.parse(text)
    assert all(bool(inputs.needles(w, "cpu", seed).q.isfinite().all()) for seed in range(5))


def test_plain_inputs_are_standard_normal_whatever_the_dtype():
    w = Workload.parse("b1-h8-s128-d64-fp32")
    q, k, _ = inputs.plain(w, "cpu", 0)
    assert abs(float(q.mean())) < 0.02
    assert float(q.std()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(q, k)
    assert torch.equal(inputs.plain(w.replace(dtype=torch.bfloat16), "cpu", 0).q, q.bfloat16())


# of one row or one head, a transpose moves nothing
@pytest.mark.parametrize("identity", ["b2-h4kv2-q3kv5-d8v6-bf16", "b2-h4kv1-q1kv5-d8v6-bf16", "b1-h1-s1-d8-bf16"])
def test_layouts_are_copies_of_the_same_values(identity):
    w = Workload.parse(identity)
    x = inputs.plain(w, "cpu", 0)
    for layout in ("bhsd", "bshd"):
        copy = x.as_layout(layout)
        for name in "qkv":
            tensor = getattr(copy, name)
            assert tuple(tensor.shape) == w.shapes(layout)[name]
            assert tensor.stride() == torch.empty_like(tensor, memory_format=torch.contiguous_format).stride()
            assert torch.equal(tensor.transpose(1, 2) if layout == "bshd" else tensor, getattr(x, name))
            assert tensor.data_ptr() != getattr(x, name).data_ptr()


# Problem.judge

W = Workload.parse("b2-h4kv2-s100-d32-causal-bf16")


@pytest.fixture(scope="module")
def problem_of_w():
    return Problem(W, "cpu", 0)


def judged(problem, kernel, layout: str = "bhsd"):
    return problem.judge(Case(problem.workload, Implementation("mine", lambda _: kernel, layout=layout), "cpu"), kernel)


def good(q, k, v):
    return attend(W, inputs.Inputs(q, k, v)).to(q.dtype)


def good_bshd(q, k, v):
    return good(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(("kernel", "layout"), [(good, "bhsd"), (good_bshd, "bshd")])
def test_a_right_kernel_passes(problem_of_w, kernel, layout):
    verdict = judged(problem_of_w, kernel, layout)
    assert (verdict.failure, verdict.sdpa_failure, verdict.complaint) == ("", "", "")
    assert 0 < verdict.rms_over_budget < verdict.error_over_budget <= 1
    assert verdict.sdpa_over_budget <= 1
    assert verdict.sdpa_error_over_budget <= 1
    assert verdict.bitwise_repeatable


@pytest.mark.parametrize(
    "text",
    [
        "b2-h4-s32-d64-fp32",
        "b2-h3kv1-s45-d64-causal-fp32",
        "b1-h4kv2-q9kv150-d96v64-causal-win100-fp32",
        "b1-h2-q50kv25-d256-causal-fp32",
        "b1-h4-s64-d4-fp32",
    ],
)
def test_float32_on_tensor_cores_is_three_products_of_tf32_not_one(text):
    w = Workload.parse(text)
    problem = Problem(w, "cpu", 0)
    assert judged(problem, partial(tf32.attend, w)).error_over_budget < 0.8
    assert judged(problem, partial(tf32.attend, w, passes=1)).error_over_budget > 100


class Stateful:
    """Kernels that go wrong only when called again."""

    def __init__(self):
        self.calls, self.outs = 0, []

    def previous(self, *x):
        self.outs.append(good(*x))
        return self.outs[max(0, len(self.outs) - 2)]

    def first(self, *x):
        self.outs.append(good(*x))
        return self.outs[0]

    def one_buffer(self, *x):
        self.outs = self.outs or [torch.empty_like(x[0])]
        return self.outs[0].copy_(good(*x))

    def one_buffer_late(self, *x):
        self.calls += 1
        return self.one_buffer(*x).mul_(0 if self.calls % 2 else 1)

    def every_other(self, *x):
        self.calls += 1
        return good(*x) * (self.calls % 2)

    def last_only(self, *x):
        self.calls += 1
        return good(*x) * (1 if self.calls == 4 else 0)

    def written_once(self, *x):
        """The second time, returns memory that nothing was written to; without poison it would hold the right answer."""
        self.calls += 1
        if self.calls % 2 == 0:
            return torch.empty_like(x[0])
        out = good(*x)
        return [out, *(out.clone() for _ in range(6))][0]

    def jittering(self, *x):
        self.calls += 1
        return good(*x) * (1 + 2**-7 * (self.calls % 2))


def changes(name: str, by):
    def kernel(q, k, v):
        out = good(q, k, v)
        by({"q": q, "k": k, "v": v}[name])
        return out

    return kernel


def unwritten(rows: slice):
    def kernel(q, k, v):
        right_answer = good(q, k, v)
        out = torch.empty_like(q)
        out[:, :, rows] = right_answer[:, :, rows]
        return out

    return kernel


WRONG = {
    "garbage": (lambda q, *_: torch.randn_like(q), "oracle"),
    "zeros": (lambda q, *_: torch.zeros_like(q), "oracle"),
    "its query": (lambda q, *_: q.clone(), "oracle"),
    "its query, itself": (lambda q, *_: q, "oracle"),
    "infinity": (lambda *x: good(*x) / 0, "inf"),
    "a NaN": (lambda *x: good(*x).index_fill(3, torch.tensor(5), math.nan), "NaN in 800 of 800 rows"),
    "scales q in place": (changes("q", lambda q: q.mul_(2)), "changed its input q"),
    "changes one key": (changes("k", lambda k: k[0, 0, 0].add_(1)), "changed its input k"),
    "empties v": (changes("v", lambda v: v.zero_()), "changed its input v"),
    "previous output": ("previous", "oracle"),
    "first output for ever": ("first", "oracle"),
    "wrong every other time": ("every_other", "oracle"),
    "one buffer, right the second time": ("one_buffer_late", "oracle"),
    "right at last": ("last_only", "oracle"),
    "written once": ("written_once", ""),
    "nothing written": (lambda q, *_: torch.empty_like(q), ""),
    "last rows unwritten": (unwritten(slice(96)), ""),
    "first row unwritten": (unwritten(slice(1, None)), ""),
    "another scale": (lambda *x: attend(W, inputs.Inputs(*x), factor=1.02).to(W.dtype), "oracle"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_rejected(problem_of_w, what):
    kernel, words = WRONG[what]
    verdict = judged(problem_of_w, getattr(Stateful(), kernel) if isinstance(kernel, str) else kernel)
    assert verdict.failure
    assert words in verdict.failure
    assert "\n" not in verdict.failure
    assert not judged(problem_of_w, good).failure  # nothing it did reaches the next case


def test_a_kernel_that_changes_a_lone_query_is_rejected():
    """In layout "bshd" too, where the transpose of one query is the same memory."""
    w = Workload.parse("b2-h4kv2-q1kv64-d32-causal-bf16")
    problem = Problem(w, "cpu", 0)

    def right(*x):
        return attend(w, inputs.Inputs(*(t.transpose(1, 2) for t in x))).to(w.dtype).transpose(1, 2)

    def wrong(q, k, v):
        out = right(q, k, v)
        q.mul_(2)
        return out

    assert "changed its input q" in judged(problem, wrong, "bshd").failure
    assert not judged(problem, right, "bshd").failure  # nothing it did reaches the next case


@pytest.mark.parametrize("what", ["garbage", "zeros", "a NaN", "scales q in place", "previous output", "wrong every other time"])
def test_a_wrong_kernel_is_not_close_to_sdpa(problem_of_w, what):
    kernel, _ = WRONG[what]
    verdict = judged(problem_of_w, getattr(Stateful(), kernel) if isinstance(kernel, str) else kernel)
    assert verdict.sdpa_failure
    assert "SDPA itself" not in verdict.sdpa_failure


def test_memory_is_poisoned(problem_of_w):
    found = []

    def kernel(*x):
        found.append(float(torch.empty_like(x[0]).isnan().float().mean()) > 0.9)  # its allocator may keep notes in it
        return good(*x)

    for _ in range(5):
        assert not judged(problem_of_w, kernel).failure
    assert sum(found) >= len(found) / 2  # a CPU's allocator may hand out another piece now and then


def test_one_output_buffer_is_allowed(problem_of_w):
    assert not judged(problem_of_w, Stateful().one_buffer).failure


def test_kernels_that_do_not_repeat_are_noted(problem_of_w):
    assert not judged(problem_of_w, Stateful().jittering).bitwise_repeatable
    assert judged(problem_of_w, good).bitwise_repeatable


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda *x: (good(*x), None), "returned tuple, not a tensor"),
        (lambda *x: good(*x).float(), "dtype torch.float32"),
        (lambda *x: good(*x)[:, :, :50], "shape (2, 4, 50, 32)"),
        (lambda *x: good(*x).transpose(1, 2), "shape (2, 100, 4, 32)"),
        (lambda *x: good(*x).to("meta"), "device meta"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_output_of_another_kind_fails_the_case(problem_of_w, kernel, words):
    with pytest.raises(CaseFailed, match="mine") as caught:
        judged(problem_of_w, kernel)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_wrong_sdpa_is_named(monkeypatch, value):
    monkeypatch.setitem(REGISTRY, "sdpa", Implementation("sdpa", lambda _: lambda q, *_: torch.full_like(q, value)))
    problem = Problem(W, "cpu", 0)
    verdict = judged(problem, good)
    assert not verdict.failure
    assert "SDPA itself fails the oracle" in verdict.sdpa_failure
    agreeing = judged(problem, lambda q, *_: torch.zeros_like(q))
    assert "oracle" in agreeing.failure  # agreeing with a wrong SDPA does not help
    assert agreeing.sdpa_failure


def raising(error: Exception):
    def build(_):
        raise error

    return build


@pytest.mark.parametrize("error", [Unsupported("no"), RuntimeError("broken")], ids=repr)
def test_where_sdpa_cannot_run_only_the_oracle_judges(monkeypatch, error):
    monkeypatch.setitem(REGISTRY, "sdpa", Implementation("sdpa", raising(error)))
    verdict = judged(Problem(W, "cpu", 0), good)
    assert (verdict.failure, verdict.sdpa_failure) == ("", "")
    assert (verdict.sdpa_over_budget, verdict.sdpa_error_over_budget) == (None, None)
    assert judged(Problem(W, "cpu", 0), lambda q, *_: torch.zeros_like(q)).failure


def test_softcap_has_no_sdpa_to_compare_with():
    problem = Problem(W.replace(softcap=20.0), "cpu", 0)
    assert problem.sdpa is None
    assert judged(problem, good).failure  # good() knows no softcap of 20
