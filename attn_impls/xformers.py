"""xFormers memory_efficient_attention: its own dispatch, and its cutlass and flash operators pinned.

https://facebookresearch.github.io/xformers/components/ops.html
"""

import contextlib
import ctypes
import functools
import importlib
import sys
from importlib import metadata

import torch

from attn_impls import Unsupported, Workload, attention

register = functools.partial(
    attention, dist="xformers", layout="bshd", devices=("cuda",), install="pip install xformers nvidia-cuda-runtime-cu12"
)


def _import_fmha():
    """xformers.ops.fmha, past two traps of its installation that would otherwise leave it broken."""
    # Its wheel is linked against CUDA 12's runtime, which a torch for CUDA 13 does not bring.
    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        for file in metadata.files("nvidia-cuda-runtime-cu12") or []:
            if file.name == "libcudart.so.12":
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
    # flash-attn-4 alone makes `flash_attn` importable with nothing in it, and xformers takes it for flash-attn 2.
    seen = sys.modules.get("flash_attn")  # flash-attn-4 may be imported already
    hide = not _installed("flash-attn")
    if hide:
        sys.modules["flash_attn"] = None  # type: ignore[assignment]
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
    finally:
        if hide and seen:
            sys.modules["flash_attn"] = seen
        elif hide:
            del sys.modules["flash_attn"]
    # where its extension does not load, xFormers logs a warning and goes on without its operators
    failure = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception
    if failure is not None:
        raise ImportError(f"its CUDA extension does not load: {failure.__cause__ or failure}")
    return fmha


def _installed(dist: str) -> bool:
    try:
        return bool(metadata.version(dist))
    except metadata.PackageNotFoundError:
        return False


def _kernel(w: Workload, operator: str = ""):
    fmha = _import_fmha()
    if w.softcap:
        raise Unsupported("xFormers has no softcap")
    op = getattr(fmha, operator).FwOp if operator else None
    bias = _bias(w, fmha.attn_bias)

    def attend(q, k, v):
        return fmha.memory_efficient_attention(q, k, v, bias, scale=w.scale, op=op and (op, None))

    def grouped(q, k, v):  # [B, S, H, D] as [B, S, KV, group, D], K and V expanded, not copied
        return q.unflatten(2, (w.kv_heads, w.group)), *(t[:, :, :, None].expand(-1, -1, -1, w.group, -1) for t in (k, v))

    kernel = attend if w.group == 1 else lambda q, k, v: attend(*grouped(q, k, v)).flatten(2, 3)
    inputs = [torch.empty(w.shapes("bshd")[name], dtype=w.dtype) for name in "qkv"]
    theirs = fmha.Inputs(*(inputs if w.group == 1 else grouped(*inputs)), bias)
    # what flash does not take, xFormers' own dispatch gives to cutlass (or, not told apart here, to Triton's split-K)
    cutlass = operator == "cutlass" or not (operator or fmha.flash.FwOp.supports(theirs))
    if cutlass and w.blind_rows:
        raise Unsupported("xFormers' cutlass operator does not give 0 to queries that see no key (causal with q_len > kv_len)")
    if cutlass and w.q_len == 1 and w.group > _heads_at_once(w) and not w.window:
        raise Unsupported(f"xFormers' cutlass operator writes past its output where one query's {w.group} heads share K and V")
    try:
        kernel(*inputs)
    except (ValueError, NotImplementedError) as error:  # what xFormers raises for inputs no operator takes
        _, _, because = str(error).partition("because:")
        reasons = dict.fromkeys(line.strip() for line in because.splitlines() if line.startswith("    "))
        raise Unsupported(f"xFormers: {'; '.join(reasons) or error}") from None
    return kernel


def _heads_at_once(w: Workload) -> int:
    """How many heads of a single query, sharing K and V, cutlass' kernel takes for the queries of one block. Its second block
    forgets that the first ones are done, and writes as many too many."""
    largest = max(w.head_dim, w.v_head_dim)
    return 64 if largest <= 64 or (largest <= 128 and torch.cuda.get_device_capability() >= (8, 0)) else 32


def _bias(w: Workload, biases):
    if not w.causal:
        return None
    if w.window:
        return biases.LowerTriangularFromBottomRightLocalAttentionMask(w.window)
    return biases.LowerTriangularMask() if w.q_len == w.kv_len else biases.LowerTriangularFromBottomRightMask()


@register("xformers", dispatches=True)
def xformers(w: Workload):
    return _kernel(w)


@register("xformers-cutlass")
def xformers_cutlass(w: Workload):
    return _kernel(w, "cutlass")


@register("xformers-flash")
def xformers_flash(w: Workload):
    return _kernel(w, "flash")
