"""FlashAttention-2 (Dao, 2023, arXiv 2307.08691), flash-attn ≥ 2.7. https://github.com/Dao-AILab/flash-attention"""

import torch

from attn_impls import Unsupported, Workload, attention


@attention(
    "flash_attn2",
    dist="flash-attn",
    layout="bshd",
    devices=("cuda",),
    install="pip install flash-attn --no-build-isolation",
)
def flash_attn2(w: Workload):
    from flash_attn import flash_attn_func

    if torch.cuda.get_device_capability()[0] < 8:
        raise Unsupported("flash-attn 2 runs on Ampere (sm_80) and newer")
    if w.dtype == torch.float32:
        raise Unsupported("flash-attn takes fp16 and bf16 only")
    if w.head_dim > 256 or w.head_dim % 8:
        raise Unsupported("flash-attn takes head dims up to 256, multiples of 8")
    if w.v_head_dim != w.head_dim:
        raise Unsupported("flash-attn 2 needs v_head_dim = head_dim")
    window = (w.window - 1, 0) if w.window else (-1, -1)
    options = {"softmax_scale": w.scale, "causal": w.causal, "window_size": window, "softcap": w.softcap}
    return lambda q, k, v: flash_attn_func(q, k, v, **options)
