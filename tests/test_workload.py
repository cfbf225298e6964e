"""Workload: ids, validation, the exact counts against brute force, FLOPs and bytes against hand-counted cases."""

import dataclasses
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attn_impls import Workload
from attn_impls.workload import DTYPES

TINY = {"batch": 1, "heads": 4, "q_len": 8, "head_dim": 16}
quick = settings(max_examples=150, deadline=None, database=None)


@st.composite
def workloads(draw, longest: int = 10**6) -> Workload:
    def size(most: int = 10**6) -> int:
        return draw(st.integers(1, most))

    kv_heads, causal = size(64), draw(st.booleans())
    return Workload(
        batch=size(),
        heads=kv_heads * size(64),
        kv_heads=kv_heads,
        q_len=size(longest),
        kv_len=draw(st.none() | st.integers(1, longest)),
        head_dim=size(1024),
        v_head_dim=draw(st.none() | st.integers(1, 1024)),
        causal=causal,
        window=draw(st.integers(0, longest + 3)) if causal else 0,
        softcap=draw(st.just(0) | st.integers(1, 1000) | st.floats(1e-3, 1e6)),
        scale_dim=draw(st.none() | st.integers(1, 1024)),
        dtype=draw(st.sampled_from(list(DTYPES.values()))),
    )


@quick
@given(workloads())
@example(Workload(**TINY, softcap=1 / 3))
@example(Workload(**TINY, softcap=1e-13))
@example(Workload(**TINY, softcap=1e22))
def test_id_round_trips(w):
    assert Workload.parse(str(w)) == w
    assert hash(Workload.parse(str(w))) == hash(w)


@quick
@given(workloads())
def test_id_is_safe_in_test_ids(w):
    assert re.fullmatch(r"[a-z0-9.-]+", str(w))  # no '=' and no ',', which -k cannot take


@quick
@given(workloads(8), workloads(8))
def test_ids_tell_workloads_apart(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("b1-h32-s8192-d128-bf16", {"heads": 32, "q_len": 8192, "head_dim": 128}),
        ("b1-h32kv8-s8192-d128-causal-bf16", {"heads": 32, "kv_heads": 8, "q_len": 8192, "head_dim": 128, "causal": True}),
        (
            "b64-h32kv8-q1kv8192-d128-causal-bf16",
            {"batch": 64, "heads": 32, "kv_heads": 8, "q_len": 1, "kv_len": 8192, "head_dim": 128, "causal": True},
        ),
        (
            "b1-h16kv8-s8192-d256-causal-win4096-cap50-bf16",
            {"heads": 16, "kv_heads": 8, "q_len": 8192, "head_dim": 256, "causal": True, "window": 4096, "softcap": 50.0},
        ),
        ("b1-h128-s4096-d192v128-causal-bf16", {"heads": 128, "q_len": 4096, "head_dim": 192, "v_head_dim": 128, "causal": True}),
        (
            "b1-h32kv16-s8192-d128-causal-cap50-scale144-bf16",
            {"heads": 32, "kv_heads": 16, "q_len": 8192, "head_dim": 128, "causal": True, "softcap": 50.0, "scale_dim": 144},
        ),
        ("b2-h1-s3-d8-cap0.5-fp16", {"batch": 2, "heads": 1, "q_len": 3, "head_dim": 8, "softcap": 0.5, "dtype": torch.float16}),
        ("b2-h1-s3-d8-fp32", {"batch": 2, "heads": 1, "q_len": 3, "head_dim": 8, "dtype": torch.float32}),
    ],
)
def test_example_ids(text, fields):
    w = Workload(**{"batch": 1, **fields})
    assert Workload.parse(text) == w
    assert str(w) == text


def test_derived_fields():
    w = Workload(**TINY)
    assert (w.kv_heads, w.kv_len, w.v_head_dim, w.scale_dim) == (4, 8, 16, 16)
    assert (w.causal, w.window, w.softcap, w.dtype) == (False, 0, 0.0, torch.bfloat16)
    assert w.scale == 0.25
    assert w.replace(scale_dim=64).scale == 0.125
    assert w.replace(kv_heads=2).group == 2
    assert w.replace(kv_len=5).offset == -3


MALFORMED = [
    "",
    "b1",
    "seed",
    "b1-h32-s8192-d128",  # no dtype
    "b1-h32-s8192-d128-bf17",
    "b1-h32-s8192-d128-fp16,bf16",
    "b1-h32-s8192-d128-bf16\n",
    " b1-h32-s8192-d128-bf16",
    "b1-h32-s8192-d128-bf16-",
    "b1-h32-s8192-d128-bf16-sdpa",
    "B1-h32-s8192-d128-bf16",
    "b1_h32_s8192_d128_bf16",
    "h32-b1-s8192-d128-bf16",
    "b1-h32-d128-s8192-bf16",
    "b1-h32-s-8-d128-bf16",
    "b1-h32-s1e3-d128-bf16",
    "b1-h32-q8192-d128-bf16",  # q without kv
    "b1-h32-s8192-d128-cap50-causal-bf16",  # out of order
    "b1-h32-s8192-d128-cap1e3-bf16",
    "b1-h32-s8192-d128-cap.5-bf16",
    # well formed, and no workload
    "b0-h32-s8192-d128-bf16",
    "b1-h0-s8192-d128-bf16",
    "b1-h32-s0-d128-bf16",
    "b1-h32-s8192-d0-bf16",
    "b1-h32kv0-s8192-d128-bf16",
    "b1-h32-s8192-d128-scale0-bf16",
    "b1-h32kv5-s8192-d128-bf16",
    "b1-h32-s8192-d128-win4096-bf16",  # window without causal
    # a second spelling of a workload that has another id
    "b01-h32-s8192-d128-bf16",
    "b\uff11-h32-s8192-d128-bf16",
    "b1-h32kv32-s8192-d128-bf16",
    "b1-h32-q8192kv8192-d128-bf16",
    "b1-h32-s8192-d128v128-bf16",
    "b1-h32-s8192-d128-causal-win0-bf16",
    "b1-h32-s8192-d128-cap0-bf16",
    "b1-h32-s8192-d128-cap50.0-bf16",
    "b1-h32-s8192-d128-scale128-bf16",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_ids(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))) as caught:
        Workload.parse(text)
    assert "\n" not in str(caught.value)


SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "scale_dim")


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"], ids=repr)
@pytest.mark.parametrize("field", SIZES)
def test_sizes_are_whole_and_positive(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}: give .+$"):
        Workload(**{**TINY, field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_heads": 3}, ("heads (4)", "kv_heads (3)", "one of 1, 2, 4")),
        ({"kv_heads": 8}, ("heads (4)", "kv_heads (8)")),
        ({"window": 4}, ("window is 4", "causal")),
        ({"causal": True, "window": -1}, ("window is -1",)),
        ({"causal": True, "window": True}, ("window is True",)),
        ({"causal": True, "window": 4.0}, ("window is 4.0",)),
        ({"causal": True, "window": None}, ("window is None",)),
        ({"causal": "full"}, ("causal is 'full'",)),
        ({"causal": None}, ("causal is None",)),
        ({"softcap": -1.0}, ("softcap is -1.0",)),
        ({"softcap": float("nan")}, ("softcap is nan",)),
        ({"softcap": float("inf")}, ("softcap is inf",)),
        ({"softcap": 10**400}, ("softcap is ",)),
        ({"softcap": "50"}, ("softcap is '50'",)),
        ({"softcap": True}, ("softcap is True",)),
        ({"dtype": torch.float64}, ("torch.float64", "torch.bfloat16", "torch.float16", "torch.float32")),
        ({"dtype": "bf16"}, ("'bf16'", "torch.bfloat16")),
    ],
)
def test_what_makes_no_problem(fields, words):
    with pytest.raises(ValueError, match=next(iter(fields.keys() - {"causal"}), "causal")) as caught:
        Workload(**{**TINY, **fields})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def visible(w: Workload) -> torch.Tensor:
    mask = w.mask("cpu")
    return torch.ones(w.q_len, w.kv_len, dtype=torch.bool) if mask is None else mask


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("b1-h1-q2kv3-d8-bf16", ["xxx", "xxx"]),
        ("b1-h1-s3-d8-causal-bf16", ["x..", "xx.", "xxx"]),
        ("b1-h1-q2kv4-d8-causal-bf16", ["xxx.", "xxxx"]),  # aligned bottom-right
        ("b1-h1-q4kv2-d8-causal-bf16", ["..", "..", "x.", "xx"]),
        ("b1-h1-s3-d8-causal-win1-bf16", ["x..", ".x.", "..x"]),  # 1 sees itself only
        ("b1-h1-q2kv5-d8-causal-win2-bf16", ["..xx.", "...xx"]),
        ("b1-h1-q3kv2-d8-causal-win1-bf16", ["..", "x.", ".x"]),
    ],
)
def test_mask(text, rows):
    w = Workload.parse(text)
    assert visible(w).tolist() == [[c == "x" for c in row] for row in rows]
    assert (w.mask("cpu") is None) == (not w.causal)
    some = torch.tensor([w.q_len - 1, 0])
    assert not w.causal or torch.equal(w.mask("cpu", some), w.mask("cpu")[some])


@quick
@given(workloads(24))
@example(Workload(**TINY, kv_len=3, causal=True))  # blind rows
@example(Workload(**TINY, kv_len=3, causal=True, window=2))
@example(Workload(**TINY, kv_len=20, causal=True, window=2))  # keys that nobody sees
@example(Workload(**TINY, causal=True, window=100))
def test_counts_agree_with_the_mask(w):
    mask = visible(w)
    assert w.pairs == mask.sum()
    assert w.seen_keys == mask.any(0).sum()
    assert w.blind_rows == (~mask.any(1)).sum()
    for rows in (slice(0, w.q_len), *(slice(row, min(row + 3, w.q_len)) for row in range(w.q_len))):
        seen = mask[rows].any(0).nonzero().flatten().tolist() or [0]
        assert w.keys_seen(rows) == slice(seen[0], seen[-1] + 1)


FLOPS = [
    ("b1-h1-s2-d4-bf16", 64, 160),  # 4 pairs × 2 × (4 + 4); 4 × 2 × 5 × 4
    ("b1-h1-s2-d4-cap50-scale16-fp32", 64, 160),
    ("b2-h3-q2kv3-d4v2-bf16", 432, 1152),  # 6 heads × 6 pairs × 2 × (4 + 2); × 2 × (3·4 + 2·2)
    ("b1-h2kv1-s4-d8-causal-bf16", 640, 1600),  # 2 heads × 10 pairs × 2 × 16
    ("b1-h1-s4-d8-causal-win2-bf16", 224, 560),  # 1 + 2 + 2 + 2 pairs
    ("b1-h1-q4kv2-d8-causal-bf16", 96, 240),  # 0 + 0 + 1 + 2 pairs
    ("b1-h1-q2kv5-d8-causal-bf16", 288, 720),  # 4 + 5 pairs
    ("b1-h32-s8192-d128-bf16", 2**40, 5 * 2**39),
]


@pytest.mark.parametrize(("text", "forward", "backward"), FLOPS)
def test_flops_by_hand(text, forward, backward):
    w = Workload.parse(text)
    assert (w.flops(), w.flops("forward"), w.flops("backward")) == (forward, forward, backward)


@pytest.mark.parametrize("text", ["b2-h4-s16-d8-fp32", "b1-h4-q3kv16-d8v24-fp32", "b2-h6kv3-s16-d16-fp32"])
def test_flops_by_torchs_counter(text):
    w = Workload.parse(text)
    shapes = w.shapes()
    q, k, v = (torch.randn(shapes[name]) for name in "qkv")
    k, v = k.repeat_interleave(w.group, 1), v.repeat_interleave(w.group, 1)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with FlopCounterMode(display=False) as forward:
        out = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
    with FlopCounterMode(display=False) as backward:
        q.detach() @ k.detach().transpose(-2, -1)  # the scores, recomputed as fused kernels do
        torch.autograd.grad(out.sum(), (q, k, v))
    assert w.flops() == forward.get_total_flops()
    assert w.flops("backward") == backward.get_total_flops()
    assert w.v_head_dim != w.head_dim or w.flops("backward") == 2.5 * w.flops()


@pytest.mark.parametrize("function", [Workload.flops, Workload.bytes])
def test_unknown_direction(function):
    with pytest.raises(KeyError, match="sideways"):
        function(Workload(**TINY), "sideways")


BYTES = [
    ("b1-h1-s2-d4-bf16", 64, 128),  # q, k, v, out: 8 elements of 2 bytes each
    ("b1-h1-s2-d4-fp32", 128, 256),
    ("b2-h4kv2-q3kv5-d8v4-fp16", 1056, 2112),  # 192 + 160 + 80 + 96 elements
    ("b1-h1-s4-d8-causal-bf16", 256, 512),
    # two of eight keys seen: q 4, k 8, v 8, out 4; backward reads those and dout 4, and writes dq 4, all of dk 32 and dv 32
    ("b1-h1-q1kv8-d4-causal-win2-fp32", 96, 384),
    ("b1-h32-s8192-d128-bf16", 2**28, 2**29),
]


@pytest.mark.parametrize(("text", "forward", "backward"), BYTES)
def test_bytes_by_hand(text, forward, backward):
    w = Workload.parse(text)
    assert (w.bytes(), w.bytes("forward"), w.bytes("backward")) == (forward, forward, backward)


def test_shapes():
    w = Workload.parse("b2-h4kv2-q3kv5-d8v6-bf16")
    assert w.shapes() == {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 6), "out": (2, 4, 3, 6)}
    assert w.shapes("bshd") == {"q": (2, 3, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 6), "out": (2, 3, 4, 6)}


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ("b1-h8-s64-d32-bf16", {"batch": 3}, "b3-h8-s64-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"dtype": torch.float16}, "b1-h8-s64-d32-fp16"),
        ("b1-h8-s64-d32-bf16", {"heads": 4}, "b1-h4-s64-d32-bf16"),
        ("b1-h8kv2-s64-d32-bf16", {"heads": 4}, "b1-h4kv2-s64-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"heads": 4, "kv_heads": 2}, "b1-h4kv2-s64-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"q_len": 16}, "b1-h8-s16-d32-bf16"),
        ("b1-h8-q1kv64-d32-bf16", {"q_len": 16}, "b1-h8-q16kv64-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"kv_len": 16}, "b1-h8-q64kv16-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"q_len": 1, "kv_len": 64}, "b1-h8-q1kv64-d32-bf16"),
        ("b1-h8-s64-d32-bf16", {"head_dim": 16}, "b1-h8-s64-d16-bf16"),
        ("b1-h8-s64-d32v8-scale9-bf16", {"head_dim": 16}, "b1-h8-s64-d16v8-scale9-bf16"),
        ("b1-h8-s64-d32-bf16", {"causal": True, "window": 9}, "b1-h8-s64-d32-causal-win9-bf16"),
    ],
)
def test_replace(before, changes, after):
    w = Workload.parse(before)
    assert str(w.replace(**changes)) == after
    assert str(w) == before


@pytest.mark.parametrize(
    ("changes", "error"), [({"batch": 0}, ValueError), ({"kv_heads": 3}, ValueError), ({"seq_len": 8}, TypeError)]
)
def test_replace_refuses(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        Workload(**TINY).replace(**changes)


def test_frozen_and_hashable():
    w = Workload(**TINY)
    assert {w: "found"}[Workload(**TINY, kv_len=8, softcap=0)] == "found"
    assert len({w, w.replace(), w.replace(batch=2), w.replace(dtype=torch.float16)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.batch = 2
    with pytest.raises(TypeError):
        Workload(1, 4, 4, 8)  # keywords only: eight sizes in a row are easily mixed up
