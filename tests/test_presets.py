"""The named presets, and the rule that makes CPU-sized workloads of them."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_impls import Workload
from attn_impls.presets import COMBINATIONS, CPU_RULE, DEFAULT_PRESETS, PRESETS, cpu_sized, preset
from attn_impls.rare import RARE, TILES


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_parses_and_has_a_source(name):
    identity, source = PRESETS[name]
    assert str(preset(name)) == identity
    assert re.fullmatch(r"[^\n]{10,}", source)


@pytest.mark.parametrize("name", PRESETS)
def test_names_are_words(name):
    assert re.fullmatch(r"[a-z][a-z0-9.-]*", name)  # no glob, no comma, no space
    assert not re.match(r"b\d", name)  # --workload would take it for an id


def test_ids_are_unique():
    assert len({identity for identity, _ in PRESETS.values()}) == len(PRESETS)


def test_defaults_exist_and_have_both_masks():
    assert set(DEFAULT_PRESETS) <= set(PRESETS)
    assert len(set(DEFAULT_PRESETS)) == len(DEFAULT_PRESETS)
    assert {preset(name).causal for name in DEFAULT_PRESETS} == {True, False}
    assert any(preset(name).group > 1 for name in DEFAULT_PRESETS)


def test_each_named_combination_has_its_kind_of_lengths_heads_and_mask():
    of = {name.removeprefix("adversarial-"): preset(name) for name in COMBINATIONS}
    assert all(w.batch * w.heads * w.q_len * w.kv_len <= 2e6 for w in of.values())  # full size on a CPU
    for name, w in of.items():
        if name.startswith("mixed"):  # as test_any_two_conditions_occur_together has them
            continue
        assert (w.kv_len % 64 == 0) == (name in {"aligned-keys", "aligned-window", "aligned-decode"})
        assert (w.q_len > w.kv_len) == (name in {"blind", "cross", "aligned-queries"})
        square = {"group", "aligned-window", "wide-window", "cap", "local", "many", "long", "single"}
        assert (w.q_len == w.kv_len) == (name in square)
        own = {"aligned-queries", "wide-window", "short", "cross-decode", "long-cross", "single-options"}
        assert (w.group == 1) == (name in own)
        unmasked = {"ragged", "value-dim", "cross", "aligned-queries", "aligned-decode", "single"}
        unmasked |= {"few", "cross-decode", "mla-decode", "long-cross"}
        assert (not w.causal) == (name in unmasked)
        assert (w.dtype != torch.bfloat16) == (name in {"aligned-keys", "single", "single-options"})
        assert w.q_len * w.kv_len <= 360000


def test_combinations_are_what_their_comments_say():
    of = {name.removeprefix("adversarial-"): preset(name) for name in COMBINATIONS}
    offset, ragged, window, options, decode, split = map(of.get, ("offset", "ragged", "window", "all-options", "decode", "split"))
    blind, value_dim, mla, group, cross = map(of.get, ("blind", "value-dim", "mla", "group", "cross"))
    assert offset.batch == ragged.batch == options.batch == 3
    assert offset.group == ragged.group == options.group == 3
    assert offset.q_len % 16 != 0 != offset.offset % 16
    assert window.window % 16 != 0
    first_keys = {i + window.offset - window.window + 1 for i in range(window.q_len)}
    assert any(key % 64 == 0 for key in first_keys)  # one key more would be of another tile
    assert (1 < window.q_len <= 16, window.softcap) == (True, 0)
    assert options.q_len > 64
    assert options.window % 16 != 0
    assert options.softcap not in (0, 50)
    assert options.scale_dim != options.head_dim == 80
    assert (decode.q_len, bool(decode.window), bool(decode.softcap)) == (1, True, True)
    assert (split.q_len, split.window, split.softcap) == (1, 0, 0)
    assert (decode.head_dim, decode.group) == (split.head_dim, split.group) == (128, 8)
    assert (blind.blind_rows > 64, blind.blind_rows % 64) == (True, 0)
    assert blind.kv_heads == 1
    assert (group.group, group.batch, group.kv_len % 64) == (7, 5, 1)
    assert cross.heads % 2 == 1
    assert cross.head_dim == 72
    assert blind.batch > 1
    assert blind.head_dim not in (32, 64)
    assert value_dim.v_head_dim > value_dim.head_dim
    assert value_dim.group == 5
    assert (mla.head_dim, mla.v_head_dim) == (192, 128)


def test_combinations_at_the_borders_of_tiles_are_what_their_comments_say():
    of = {name.removeprefix("adversarial-"): preset(name) for name in COMBINATIONS}
    assert of["aligned-queries"].q_len % 128 == 0
    assert of["aligned-keys"].dtype == torch.float16
    assert of["aligned-keys"].offset % 64 == of["aligned-keys"].q_len % 64 == 0
    assert of["aligned-window"].group > 8
    assert of["wide-window"].q_len - 128 > of["wide-window"].window > 2 * 128
    assert max(of["tiny"].q_len, of["tiny"].kv_len) < 16
    assert of["far"].offset > 1024
    assert (of["aligned-window"].q_len % 128, of["aligned-window"].window % 64) == (0, 0)
    assert (of["aligned-decode"].q_len, of["aligned-decode"].batch, of["aligned-decode"].group) == (1, 1, 9)
    assert (of["page"].q_len, of["page"].kv_len % 64, of["page"].window, bool(of["page"].softcap)) == (1, 1, 0, True)
    assert of["short"].q_len == 1
    assert of["short"].kv_len < 64
    assert of["far"].offset % 128 == 1
    assert of["local"].window % 128 == 127
    assert of["wide-window"].window % 128 == 2
    assert (of["local"].head_dim, of["few"].causal, of["few"].q_len, of["cross-decode"].causal) == (256, False, 7, False)
    assert of["mla-decode"].group > 16
    assert (of["many"].batch > 8, of["many"].heads > 32) == (True, True)
    assert min(of["long"].q_len, of["long"].kv_len, of["long-cross"].kv_len) > 512
    assert (of["single-options"].dtype, bool(of["single-options"].softcap)) == (torch.float32, True)
    assert (of["cap"].head_dim, of["cap"].window, bool(of["cap"].softcap)) == (256, 0, True)
    assert of["single"].dtype == torch.float32


def conditions(w):
    """What code branches on, each as one of a few kinds."""
    length = "one" if w.q_len == 1 else "few" if w.q_len <= 16 else "fewer than keys"
    dims = {w.head_dim < 64: "below 64", w.head_dim == 64: "64", 64 < w.head_dim < 128: "between", w.head_dim == 128: "128"}
    return {
        "dtype": str(w.dtype),
        "mask": "window" if w.window else "causal" if w.causal else "full",
        "softcap": w.softcap > 0,
        "scale": w.scale_dim != w.head_dim,
        "heads": "own" if w.group == 1 else "one" if w.kv_heads == 1 else "large groups" if w.group > 5 else "groups",
        "queries": "as keys" if w.q_len == w.kv_len else "more than keys" if w.q_len > w.kv_len else length,
        "keys": "less than a tile" if w.kv_len < 64 else "whole tiles" if w.kv_len % 64 == 0 else w.kv_len > 512,
        "head dim": dims.get(True, "above 128"),
        "values": (w.v_head_dim > w.head_dim) - (w.v_head_dim < w.head_dim),
        "batch": w.batch > 1,
    }


def test_any_two_conditions_occur_together():
    found = [conditions(preset(name)) for name in COMBINATIONS]
    kinds = {name: {one[name] for one in found} for name in found[0]}
    assert [len(kinds[name]) for name in kinds] == [3, 3, 2, 2, 4, 5, 4, 5, 3, 2]
    together = {frozenset(pair) for one in found for pair in itertools.combinations(one.items(), 2)}
    for (first, some), (second, others) in itertools.combinations(kinds.items(), 2):
        missing = {(x, y) for x in some for y in others if frozenset({(first, x), (second, y)}) not in together}
        assert not missing, (first, second)


def test_any_three_conditions_occur_together():
    """But for values longer than keys at large head dims, and at least as many queries as keys of over 512."""
    found = [conditions(w) for w in (*map(preset, COMBINATIONS), *map(Workload.parse, RARE))]
    kinds = {name: {one[name] for one in found} for name in found[0]}
    together = {frozenset(three) for one in found for three in itertools.combinations(one.items(), 3)}
    for three in itertools.combinations(kinds, 3):
        for values in itertools.product(*(kinds[name] for name in three)):
            one = dict(zip(three, values, strict=True))
            rare = one.get("values") == 1 and one.get("head dim") in ("128", "above 128")
            large = one.get("keys") is True and one.get("queries") in ("as keys", "more than keys")
            assert frozenset(one.items()) in together or rare or large, one


def test_rare_workloads_are_canonical_small_and_new():
    assert [str(Workload.parse(text)) for text in RARE] == list(RARE)
    assert len(set(RARE)) == len(RARE)
    assert not set(map(Workload.parse, RARE)) & set(map(preset, PRESETS))
    assert max(Workload.parse(text).flops() for text in RARE) < 1e9


def test_tiles_are_whole_or_one_more():
    lengths = {w.kv_len for w in map(Workload.parse, TILES)}
    for tile in (64, 80, 96, 112, 128, 160, 176, 192, 256, 320):
        assert any(length % tile == 0 for length in lengths), tile
    for tile in (64, 96, 128, 176, 192, 256):
        assert any(length % tile == 1 for length in lengths), tile


def test_the_large_preset_overflows():
    w = preset("large-grid")
    assert w.batch * w.heads > 65535
    assert w.flops() < 1e10
    assert "large-grid" not in {*DEFAULT_PRESETS, *COMBINATIONS}


def test_seed_is_the_comparison_it_grew_from():
    w = preset("seed")
    assert (w.batch, w.q_len, w.kv_len, w.heads, w.heads * w.head_dim, w.causal) == (1, 8192, 8192, 32, 4096, False)


def test_unknown_preset():
    with pytest.raises(KeyError, match="sed"):
        preset("sed")


def assert_kept(w: Workload, small: Workload) -> None:
    for field in ("head_dim", "v_head_dim", "scale_dim", "softcap", "dtype", "causal", "group"):
        assert getattr(small, field) == getattr(w, field), field
    assert bool(small.window) == bool(w.window)
    assert (small.kv_heads == small.heads) == (w.kv_heads == w.heads)
    assert (small.q_len < small.kv_len, small.q_len > small.kv_len) == (w.q_len < w.kv_len, w.q_len > w.kv_len)
    assert (small.window < small.kv_len) == (w.window < w.kv_len)
    for field in ("q_len", "kv_len", "window"):
        assert getattr(small, field) % 16 == getattr(w, field) % 16, field


@pytest.mark.parametrize("name", PRESETS)
def test_cpu_sized_presets(name):
    w, small = preset(name), cpu_sized(preset(name))
    assert_kept(w, small)
    assert small.flops() < 3e10  # about a second on a slow core
    assert small.flops() * 64 <= w.flops() or w.flops() < 1e9
    assert Workload.parse(str(small)) == small


@pytest.mark.parametrize(
    ("full", "small"),
    [
        ("b1-h32-s8192-d128-bf16", "b1-h8-s256-d128-bf16"),
        ("b8-h16-s512-d64-fp16", "b2-h4-s32-d64-fp16"),
        ("b2-h32kv8-s1024-d64-causal-bf16", "b2-h8kv2-s32-d64-causal-bf16"),
        ("b1-h28kv4-s8192-d128-causal-bf16", "b1-h7kv1-s256-d128-causal-bf16"),
        ("b1-h6kv2-s1023-d64-bf16", "b1-h3kv1-s47-d64-bf16"),  # ÷ 2
        ("b1-h20kv10-s1023-d64-bf16", "b1-h10kv5-s47-d64-bf16"),  # 4 divides the heads only
        ("b1-h6kv3-s1023-d64-bf16", "b1-h6kv3-s47-d64-bf16"),  # neither
        ("b1-h4-q1kv8192-d128-causal-bf16", "b1-h1-q1kv256-d128-causal-bf16"),
        ("b1-h4-q4096kv77-d40-bf16", "b1-h1-q128kv77-d40-bf16"),
        ("b1-h4-s256-d72-bf16", "b1-h1-s256-d72-bf16"),  # as it is
        ("b1-h4-s257-d72-bf16", "b1-h1-s33-d72-bf16"),  # 8 is below 32
        ("b1-h4-s1500-d64-bf16", "b1-h1-s44-d64-bf16"),
        ("b1-h4-q1023kv1024-d64-causal-bf16", "b1-h1-q47kv48-d64-causal-bf16"),  # longer stays longer
        ("b1-h4-q250kv300-d64-causal-bf16", "b1-h1-q250kv252-d64-causal-bf16"),
        ("b1-h4-q512kv200-d64-bf16", "b1-h1-q208kv200-d64-bf16"),
        ("b1-h4-s20-d72-bf16", "b1-h1-s20-d72-bf16"),
        ("b1-h16kv8-s8192-d256-causal-win4096-cap50-bf16", "b1-h4kv2-s256-d256-causal-win128-cap50-bf16"),
        ("b1-h4-s8192-d64-causal-win128-bf16", "b1-h1-s256-d64-causal-win128-bf16"),
        ("b1-h4-s8192-d64-causal-win1023-bf16", "b1-h1-s256-d64-causal-win47-bf16"),
        ("b1-h4-s1023-d64-causal-win200-bf16", "b1-h1-s47-d64-causal-win40-bf16"),  # still hides keys
        ("b1-h4-s200-d64-causal-win300-bf16", "b1-h1-s200-d64-causal-win204-bf16"),  # and none
        ("b1-h128-s4096-d192v128-causal-scale144-bf16", "b1-h32-s128-d192v128-causal-scale144-bf16"),
    ],
)
def test_cpu_sized_by_the_rule(full, small):
    assert str(cpu_sized(Workload.parse(full))) == small


def test_the_rule_in_words():
    for words in ("batch ≤ 2", "heads ÷ 4 (or 2", "lengths and window above 256 ÷ 32", "not below 32", "over a multiple of 16"):
        assert words in CPU_RULE


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_cpu_sized_anything(data):
    def size(most: int) -> int:
        return data.draw(st.integers(1, most))

    kv_heads, causal = size(16), data.draw(st.booleans())
    sizes = {"batch": size(64), "heads": kv_heads * size(16), "kv_heads": kv_heads, "q_len": size(9000), "head_dim": size(256)}
    kv_len = data.draw(st.none() | st.integers(1, 9000))
    w = Workload(**sizes, kv_len=kv_len, causal=causal, window=data.draw(st.integers(0, 9000)) if causal else 0)
    small = cpu_sized(w)
    assert_kept(w, small)
    assert small.batch == min(w.batch, 2)
    assert w.heads in (small.heads, 2 * small.heads, 4 * small.heads)
    for field in ("q_len", "kv_len", "window"):
        before, after = getattr(w, field), getattr(small, field)
        assert after == before if before <= 256 and field != "window" else after <= before
    if w.q_len == w.kv_len > 256 and not w.window:
        assert max(32, w.q_len // 32 - 15) <= small.q_len <= max(32, w.q_len // 32) + 15
    assert small.pairs <= w.pairs
