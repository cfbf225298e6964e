"""FlashInfer (Ye et al., 2025, arXiv 2501.01005): one request, a ragged batch, or decode over pages. https://docs.flashinfer.ai"""

import torch

from attn_impls import Unsupported, Workload, attention

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
WORKSPACE_BYTES = 2**28
PAGE = 16  # tokens, where it divides kv_len: a contiguous cache is then a paged one without a copy


@attention(
    "flashinfer",
    dist="flashinfer-python",
    layout="bshd",
    devices=("cuda",),
    backward=False,
    dispatches=True,
    concurrent=False,  # its single-request prefill has one scratch buffer a device
    compiles="minutes",
    install="pip install flashinfer-python (compiles with nvcc when first used)",
)
def flashinfer(w: Workload):
    import flashinfer as library

    if w.dtype == torch.float32:
        raise Unsupported("FlashInfer takes fp16 and bf16 only")
    if (w.head_dim, w.v_head_dim) not in HEAD_DIMS:
        raise Unsupported("FlashInfer takes head dims 64, 128, 256, and 192 with v_head_dim 128")
    if w.q_len == 1 and w.head_dim != w.v_head_dim:
        raise Unsupported("FlashInfer decodes with v_head_dim = head_dim only")
    device = torch.get_default_device()
    with torch.device("cpu"):  # what it plans on the host, it creates without naming a device
        if w.q_len == 1:
            return _decode(w, library.BatchDecodeWithPagedKVCacheWrapper, device)
        if w.batch > 1:
            return _ragged(w, library.BatchPrefillWithRaggedKVCacheWrapper, device)
    return _single(w, library.single_prefill_with_kv_cache)


def _options(w: Workload) -> dict:
    return {"window_left": w.window - 1, "logits_soft_cap": w.softcap or None, "sm_scale": w.scale}


def _single(w: Workload, prefill):
    options = _options(w)
    return lambda q, k, v: prefill(q[0], k[0], v[0], causal=w.causal, **options)[None]


def _ragged(w: Workload, Wrapper, device: torch.device):
    wrapper = Wrapper(_workspace(device), "NHD")
    starts = torch.arange(w.batch + 1, dtype=torch.int32, device=device)
    heads = w.heads, w.kv_heads, w.head_dim, w.v_head_dim
    wrapper.plan(starts * w.q_len, starts * w.kv_len, *heads, causal=w.causal, q_data_type=w.dtype, **_options(w))
    shape = w.shapes("bshd")["out"]
    return lambda q, k, v: wrapper.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(shape)


def _decode(w: Workload, Wrapper, device: torch.device):
    page = PAGE if w.kv_len % PAGE == 0 else 1
    wrapper = Wrapper(_workspace(device), "NHD", use_tensor_cores=w.group >= 4)
    starts = torch.arange(w.batch + 1, dtype=torch.int32, device=device) * (w.kv_len // page)
    pages = torch.arange(w.batch * w.kv_len // page, dtype=torch.int32, device=device)
    last = torch.full((w.batch,), page, dtype=torch.int32, device=device)
    wrapper.plan(starts, pages, last, w.heads, w.kv_heads, w.head_dim, page, q_data_type=w.dtype, **_options(w))
    cache = -1, page, w.kv_heads, w.head_dim
    return lambda q, k, v: wrapper.run(q[:, 0], (k.view(cache), v.view(cache)))[:, None]


def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
