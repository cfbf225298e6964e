"""xFormers' two installation traps, and what its operators are not asked, on stand-ins."""

import sys
import types
from collections import namedtuple

import pytest
import torch
from test_adapters import attention_over, judged, unsupported

from attn_impls import xformers as adapter
from attn_impls.registry import discover

FMHA = """
import importlib.util
if importlib.util.find_spec("flash_attn"):
    import flash_attn.flash_attn_interface
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write a stand-in for xFormers and put it on the path; `failure` is what its extension failed with."""

    def write(failure="None"):
        (tmp_path / "xformers" / "ops").mkdir(parents=True)
        (tmp_path / "xformers" / "__init__.py").touch()
        (tmp_path / "xformers" / "ops" / "__init__.py").touch()
        (tmp_path / "xformers" / "ops" / "fmha.py").write_text(FMHA)
        (tmp_path / "xformers" / "_cpp_lib.py").write_text(f"_cpp_library_load_exception = {failure}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.mark.parametrize("imported", [False, True], ids=["flash-attn-4 installed", "flash-attn-4 imported"])
def test_flash_attn_4_without_2_is_not_taken_for_it(fake, monkeypatch, tmp_path, imported):
    fake()
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # a namespace with nothing of flash-attn 2 in it
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    before = sys.modules.get("flash_attn")
    assert adapter._import_fmha().__name__ == "xformers.ops.fmha"
    assert sys.modules.get("flash_attn") is before


def test_an_extension_that_did_not_load_is_loud(fake):
    fake(failure='RuntimeError("libcudart.so.12: cannot open shared object file")')
    with pytest.raises(ImportError, match=r"extension does not load: libcudart\.so\.12"):
        adapter._import_fmha()


class Bias:
    """The masks that the adapter makes, by the options that a workload would have."""

    def __init__(self, **options):
        self.options = options

    @classmethod
    def every(cls):
        return types.SimpleNamespace(
            LowerTriangularMask=lambda: cls(causal=True),
            LowerTriangularFromBottomRightMask=lambda: cls(causal=True),
            LowerTriangularFromBottomRightLocalAttentionMask=lambda window: cls(causal=True, window=window),
        )


def memory_efficient_attention(q, k, v, bias, scale, op):
    if q.ndim == 5:
        assert k.stride(3) == v.stride(3) == 0
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]
    assert op is None or op == ("cutlass", None)
    out = attention_over(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale, **(bias.options if bias else {}))
    out = out.transpose(1, 2)
    return out if q.shape[2] == k.shape[2] else out.unflatten(2, (k.shape[2], -1))


@pytest.fixture
def fmha(monkeypatch):
    """One whose flash operator takes what flash-attn 2 takes."""
    discover()
    inputs = namedtuple("Inputs", "query key value attn_bias")
    flash = types.SimpleNamespace(supports=lambda x: x.value.dtype != torch.float32 and x.query.shape[-1] == x.value.shape[-1])
    module = types.SimpleNamespace(
        Inputs=inputs,
        attn_bias=Bias.every(),
        flash=types.SimpleNamespace(FwOp=flash),
        cutlass=types.SimpleNamespace(FwOp="cutlass"),
        memory_efficient_attention=memory_efficient_attention,
    )
    monkeypatch.setattr(adapter, "_import_fmha", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return module


BLIND, ONE_QUERY = "does not give 0 to queries that see no key", "writes past its output where one query's 70 heads share K and V"


@pytest.mark.usefixtures("fmha")
@pytest.mark.parametrize(
    ("text", "by_flash", "by_cutlass"),
    [
        ("b2-h4kv2-q30kv70-d64-causal-win20-scale144-bf16", "", ""),
        ("b1-h2-q70kv30-d64-causal-bf16", "", BLIND),
        ("b1-h2-q70kv30-d64-causal-fp32", BLIND, BLIND),  # which flash does not take
        ("b1-h2-q70kv30-d72v80-causal-bf16", BLIND, BLIND),
        ("b1-h70kv1-q1kv30-d64-causal-bf16", "", ONE_QUERY),
        ("b1-h140kv2-q1kv30-d128v32-bf16", ONE_QUERY, ONE_QUERY),
        ("b1-h70kv1-q1kv30-d160-bf16", "", ONE_QUERY),
        ("b1-h70kv1-q2kv30-d64-causal-bf16", "", ""),
        ("b1-h70kv1-q1kv30-d64-causal-win9-bf16", "", ""),
        ("b1-h64kv1-q1kv30-d128-causal-bf16", "", ""),
        ("b1-h32kv1-q1kv30-d160-causal-bf16", "", ""),
    ],
)
def test_what_cutlass_gets_wrong_is_not_asked_of_it(text, by_flash, by_cutlass):
    for name, reason in (("xformers", by_flash), ("xformers-cutlass", by_cutlass)):
        if reason:
            assert reason in unsupported(name, text)
        else:
            assert not judged(name, text).disqualified


@pytest.mark.parametrize(
    ("head_dim", "capability", "most"), [(64, (7, 5), 64), (128, (8, 0), 64), (128, (7, 5), 32), (160, (9, 0), 32)]
)
@pytest.mark.usefixtures("fmha")
def test_how_many_heads_of_one_query_cutlass_is_asked(monkeypatch, head_dim, capability, most):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for heads in (most, most + 1):
        text = f"b1-h{heads}kv1-q1kv9-d{head_dim}-fp16"
        if heads == most:
            assert not judged("xformers-cutlass", text).disqualified
        else:
            assert f"one query's {heads} heads" in unsupported("xformers-cutlass", text)
