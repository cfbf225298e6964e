"""Needles, and the plain inputs that they are put into."""

import math

import pytest
import torch
from plain_attention import attend

from attn_impls import Workload
from attn_impls.harness import inputs, oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def pointed_at(w: Workload, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The needles as [N, 3] (batch · heads + head, query, key), and the mask [Sq, Skv] that they respect."""
    x, plain = inputs.pointed(w, "cpu", seed), inputs.plain(w, "cpu", seed)
    assert torch.equal(x.k, plain.k)
    assert torch.equal(x.v, plain.v * inputs.loudness(w))
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
    x = inputs.pointed(w, "cpu", 0)
    spots, mask = pointed_at(w)
    weights = attend(w, x._replace(v=torch.eye(w.kv_len).expand(w.batch, w.kv_heads, -1, -1))).flatten(0, 1)
    head, query, key = spots[mask[spots[:, 1], spots[:, 2]]].T
    found = weights[head, query, key]
    assert bool((found > 0.99).any())
    assert bool(((found > 0.2) & (found < 0.9)).any())
    assert 0.01 < len(spots) / (w.batch * w.heads * w.q_len) <= 0.5 or w.q_len < 8  # the others stay ordinary


def scores_of(w: Workload) -> torch.Tensor:
    """The needles' scores, before cap and mask, [B, H, Sq, Skv]."""
    x = inputs.pointed(w, "cpu", 0)
    return x.q.double() @ x.k.double().repeat_interleave(w.group, 1).mT * w.scale


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("text", ["b1-h2-s130-d64", "b2-h6kv3-q50kv203-d64-causal", "b4-h4-q1kv512-d128-causal"])
def test_some_needles_tower_out_of_float32s_range(text, dtype):
    w = Workload.parse(f"{text}-{dtype}")
    scores, mask = scores_of(w), w.mask("cpu")
    top = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).topk(2).values
    towers = (top[..., 0] > 160) & (top[..., 0] < 500)
    assert 1 <= int(towers.sum()) <= max(3, towers.numel() / 8)
    assert bool((top[towers][:, 1] > 160).any())  # its partner: exp overflows for both
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
    pairs = (capped[..., 1] > 0.8 * w.softcap) & (top[..., 0] < 100)
    assert int(pairs.sum()) >= 2
    assert bool(((top[..., 0] - top[..., 1])[pairs] > 3 * (capped[..., 0] - capped[..., 1])[pairs]).all())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "text", ["b1-h4-s128-d64-cap50", "b2-h6kv2-q77kv133-d80-causal-cap20-scale50", "b4-h16-q1kv512-d256-cap50"]
)
def test_with_a_softcap_some_needles_are_far_beyond_it(text, dtype):
    w = Workload.parse(f"{text}-{dtype}")
    most = scores_of(w).amax(-1) / w.softcap
    assert bool(((most > 7) & (most < 9)).any())
    assert bool((2 * most > 88.8).any())  # exp overflows in float32
    unscaled = float(scores_of(w).abs().max()) / w.scale
    assert (unscaled < torch.finfo(torch.float16).max) == (dtype == "fp16")  # as plain kernels round it


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
    assert kinds == {inputs.HALF, inputs.SATURATED, inputs.TOWERING, inputs.SUNKEN, inputs.HUGE}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("text", ["b1-h2-s130-d64", "b2-h6kv3-q50kv203-d40-causal-win66", "b2-h16kv2-q1kv512-d128-causal"])
def test_some_queries_have_low_scores_alone(text, dtype):
    w = Workload.parse(f"{text}-{dtype}")
    x, mask = inputs.needles(w, "cpu", 0), w.mask("cpu")
    scores = x.q.double() @ x.k.double().repeat_interleave(w.group, 1).mT * w.scale
    most = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).amax(-1)
    low = (most < -88) & most.isfinite()
    assert 1 <= int(low.sum()) <= most.numel() / 8
    assert bool((scores[low] < -80).all())  # hidden keys' too
    # the others see what the keys have in common as little as roundings let them
    before = inputs.pointed(w, "cpu", 0)
    plain = before.q.double() @ before.k.double().repeat_interleave(w.group, 1).mT * w.scale
    deep = (x.k != before.k).flatten(2).any(-1).repeat_interleave(w.group, 1)
    shift = (scores - plain).median(-1).values[~low & deep[..., None]].abs()
    assert shift.numel() > 1
    assert float(shift.median()) < 0.5
    assert float(shift.max()) > 0  # of what bf16 makes of it, at least


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", True), ("fp16", False), ("fp32", True)])
@pytest.mark.parametrize("text", ["b1-h4-s130-d64", "b1-h4-s130-d80-cap20"])
def test_some_products_are_past_float16(text, dtype, expected):
    w = Workload.parse(f"{text}-{dtype}")
    assert (float(scores_of(w).max() / w.scale) > torch.finfo(torch.float16).max) == expected
    assert float(inputs.pointed(w, "cpu", 0, quiet=True).q.abs().max()) < 500


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
