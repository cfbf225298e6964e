"""What the adapters of sage and FlashInfer ask of their libraries, which stand-ins here compute on the CPU."""

import sys
import types

import pytest
import torch

from attn_impls import Unsupported
from attn_impls.harness.case import Case, build
from attn_impls.harness.inputs import Inputs, plain
from attn_impls.harness.judge import Problem
from attn_impls.harness.oracle import attend
from attn_impls.registry import REGISTRY, Implementation, discover
from attn_impls.workload import Workload


@pytest.fixture(autouse=True, scope="module")
def _discovered():
    discover()


def attention_over(q, k, v, **wanted):
    """A right answer from what a library was asked for; q, k, v and out [B, heads, S, D]."""
    w = Workload(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        scale_dim=round(wanted.pop("scale") ** -2),
        dtype=q.dtype,
        **wanted,
    )
    return attend(w, Inputs(q, k, v), None, torch.float32).to(q.dtype)


def judged(name, text):
    w = Workload.parse(text)
    case = Case(w, REGISTRY[name], "cpu")
    problem = Problem(w, "cpu", 0)
    kernel = build(case, problem.plain.as_layout(case.implementation.layout)).kernel
    return problem.judge(case, kernel)


def unsupported(name, text):
    w = Workload.parse(text)
    with pytest.raises(Unsupported) as caught:
        build(Case(w, REGISTRY[name], "cpu"), plain(w, "cpu", 0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# SageAttention


@pytest.fixture
def sage(monkeypatch):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
        assert tensor_layout == "HND"
        if smooth_k:
            k -= k.mean(2, keepdim=True)  # as version 1.0.6 does
        return attention_over(q, k, v, causal=is_causal, scale=sm_scale)

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(Implementation, "version", "1.0.6")


@pytest.mark.usefixtures("sage")
@pytest.mark.parametrize("text", ["b1-h4kv2-s130-d64-causal-bf16", "b2-h2-q50kv128-d128-scale144-fp16", "b1-h2-s64-d96-fp32"])
def test_sage(text):
    assert not judged("sage", text).disqualified
    assert REGISTRY["sage"].approximate == "int8"


@pytest.mark.usefixtures("sage")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("b1-h2-s64-d64-causal-win8-bf16", "no window"),
        ("b1-h2-s64-d64-cap50-bf16", "no softcap"),
        ("b1-h2-s64-d80-bf16", "64, 96 and 128"),
        ("b1-h2-s64-d128v64-bf16", "v_head_dim = head_dim"),
        ("b1-h2-q32kv64-d64-causal-bf16", "q_len = kv_len"),
        ("b1-h2-s65-d64-bf16", "multiple of 64"),
    ],
)
def test_what_sage_cannot_do(text, reason):
    assert reason in unsupported("sage", text)


def test_another_version_of_sage(monkeypatch):
    monkeypatch.setattr(Implementation, "version", "2.2.0")
    assert "2.2.0 is installed" in unsupported("sage", "b1-h2-s64-d64-bf16")


# FlashInfer


def heads_first(x):
    return x.transpose(-3, -2)


def single_prefill(q, k, v, causal, window_left, logits_soft_cap, sm_scale):
    q, k, v = (heads_first(x)[None] for x in (q, k, v))
    options = {"causal": causal, "window": window_left + 1, "softcap": logits_soft_cap or 0.0, "scale": sm_scale}
    return heads_first(attention_over(q, k, v, **options)[0])


class Planned:
    """A wrapper of either kind: what it was planned for, request by request."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")
        assert not bool(workspace.any())
        self.tensor_cores = use_tensor_cores


class Ragged(Planned):
    def plan(self, q_starts, kv_starts, heads, kv_heads, head_dim, v_head_dim, q_data_type, **options):
        self.starts, self.options = (q_starts.tolist(), kv_starts.tolist()), options
        self.sizes = heads, kv_heads, head_dim, v_head_dim, q_data_type

    def run(self, q, k, v):
        assert self.sizes == (q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype)
        outs = []
        for n in range(len(self.starts[0]) - 1):
            mine, theirs = (slice(starts[n], starts[n + 1]) for starts in self.starts)
            outs.append(single_prefill(q[mine], k[theirs], v[theirs], **self.options))
        return torch.cat(outs)


class Paged(Planned):
    def plan(self, starts, pages, last, heads, kv_heads, head_dim, page, q_data_type, **options):
        assert self.tensor_cores == (heads // kv_heads >= 4)
        assert bool((last == page).all())
        self.starts, self.pages, self.options = starts.tolist(), pages.long(), options
        self.sizes = heads, kv_heads, head_dim, page, q_data_type

    def run(self, q, cache):
        k, v = cache
        assert self.sizes == (q.shape[1], k.shape[2], q.shape[2], k.shape[1], q.dtype)
        outs = []
        for n in range(len(q)):
            pages = self.pages[self.starts[n] : self.starts[n + 1]]
            whole = (x[pages].flatten(0, 1) for x in (k, v))
            outs.append(single_prefill(q[n][None], *whole, causal=True, **self.options))
        return torch.cat(outs)


@pytest.fixture
def flashinfer(monkeypatch):
    module = types.SimpleNamespace(
        single_prefill_with_kv_cache=single_prefill,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
        BatchDecodeWithPagedKVCacheWrapper=Paged,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    "text",
    [
        "b1-h4kv2-s70-d64-bf16",
        "b1-h4kv2-q30kv70-d128-causal-win20-cap50-scale144-bf16",
        "b1-h2-s70-d192v128-causal-bf16",
        "b3-h2-s70-d64-fp16",
        "b2-h4kv2-q30kv70-d64-causal-win20-bf16",
        "b3-h8kv2-q1kv96-d64-causal-bf16",  # pages of 16
        "b2-h4kv2-q1kv70-d64-causal-win20-cap50-bf16",  # pages of 1
    ],
)
def test_flashinfer(text):
    assert not judged("flashinfer", text).disqualified


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("b1-h2-s64-d64-fp32", "fp16 and bf16"),
        ("b1-h2-s64-d96-bf16", "head dims 64, 128, 256"),
        ("b2-h2-q1kv64-d192v128-causal-bf16", "decodes with v_head_dim = head_dim"),
    ],
)
def test_what_flashinfer_cannot_do(text, reason):
    assert reason in unsupported("flashinfer", text)
