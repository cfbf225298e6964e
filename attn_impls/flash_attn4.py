"""FlashAttention-4 (CuTe DSL; Hopper and Blackwell). https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute"""

import os

import torch

from attn_impls import Unsupported, Workload, attention

# Read when flash-attn 4 is imported, by whomever. Without it each process compiles every kernel anew, for seconds each.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


@attention(
    "flash_attn4",
    dist="flash-attn-4",
    layout="bshd",
    devices=("cuda",),
    compiles="seconds",
    install="pip install --pre flash-attn-4",
)
def flash_attn4(w: Workload):
    from flash_attn.cute import flash_attn_func

    if w.dtype == torch.float32:
        raise Unsupported("FlashAttention-4 takes fp16 and bf16 only")
    if torch.cuda.get_device_capability()[0] < 9:
        raise Unsupported("FlashAttention-4 runs on Hopper (sm_90) and newer")
    if max(w.head_dim, w.v_head_dim) > 256 or w.head_dim % 8 or w.v_head_dim % 8:
        raise Unsupported("FlashAttention-4 takes head dims up to 256, multiples of 8")
    window = (w.window - 1, 0) if w.window else (None, None)
    options = {"softmax_scale": w.scale, "causal": w.causal, "window_size": window, "softcap": w.softcap}

    def kernel(q, k, v):
        out = flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    def forward_alone(q, k, v):
        if q.requires_grad:
            raise Unsupported("FlashAttention-4 has no backward pass of shared KV heads whose v_head_dim is not head_dim")
        return kernel(q, k, v)

    return forward_alone if w.group > 1 and w.v_head_dim != w.head_dim else kernel
