"""FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608), Hopper only. https://github.com/Dao-AILab/flash-attention"""

import torch

from attn_impls import Unsupported, Workload, attention


@attention(
    "flash_attn3",
    dist=("flash-attn-3", "fa3-fwd"),
    layout="bshd",
    devices=("cuda",),
    install="pip install fa3-fwd (forward only), or build flash-attention/hopper",
)
def flash_attn3(w: Workload):
    if torch.cuda.get_device_capability()[0] != 9:
        raise Unsupported("FlashAttention-3 runs on Hopper (sm_90) only")
    if w.dtype == torch.float32:
        raise Unsupported("FlashAttention-3 takes fp16 and bf16 only")
    forward_only = flash_attn3.dist == "fa3-fwd"
    if forward_only:
        from fa3_fwd_interface import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    if forward_only and w.dtype != torch.bfloat16:
        raise Unsupported("the fa3-fwd wheel takes bf16 only")
    if forward_only and (w.window or w.softcap):
        raise Unsupported("the fa3-fwd wheel has no window and no softcap")
    if w.head_dim > 256 or w.head_dim % 8:
        raise Unsupported("FlashAttention-3 takes head dims up to 256, multiples of 8")
    if w.v_head_dim != w.head_dim and not (
        (128 < w.head_dim <= 192 and 96 < w.v_head_dim <= 128) or (w.head_dim <= 64 and w.v_head_dim <= 512)
    ):
        raise Unsupported("FlashAttention-3 takes another v_head_dim with head_dim ≤ 64, or up to 128 with head_dim up to 192")
    window = (w.window - 1, 0) if w.window else (-1, -1)
    options = {"softmax_scale": w.scale, "causal": w.causal, "window_size": window, "softcap": w.softcap}

    def without_gradient(q, k, v):
        if q.requires_grad:
            raise Unsupported("forward only: the fa3-fwd wheel has no backward pass")
        return flash_attn_func(q, k, v, **options)

    return without_gradient if forward_only else lambda q, k, v: flash_attn_func(q, k, v, **options)
