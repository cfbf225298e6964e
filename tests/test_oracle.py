"""The float64 oracle against brute force and SDPA; sampled rows, chunks, and the memory it takes."""

import math

import pytest
import torch
from plain_attention import attend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attn_impls import Workload
from attn_impls.harness import inputs, oracle
from attn_impls.harness.approximate import loosened

pytestmark = pytest.mark.usefixtures("one_thread")


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
    torch.testing.assert_close(chunked.out, whole.out, rtol=1e-10, atol=0)  # sums in another order; V is loud
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
