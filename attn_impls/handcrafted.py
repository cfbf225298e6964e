"""The baseline a person writes: matmul, scale, mask, softmax, matmul (Vaswani et al., 2017, arXiv 1706.03762)."""

import torch

from attn_impls import Unsupported, Workload, attention


@attention("handcrafted")
def handcrafted(w: Workload):
    if w.blind_rows:
        raise Unsupported("a plain softmax gives NaN for rows that see no key (causal with q_len > kv_len)")
    mask = w.mask(torch.get_default_device())
    hidden = None if mask is None else ~mask  # [Sq, Skv]

    def kernel(q, k, v):
        if w.group > 1:
            k, v = k.repeat_interleave(w.group, 1), v.repeat_interleave(w.group, 1)  # [B, H, Skv, D]
        scores = (q @ k.transpose(-2, -1)) * w.scale  # [B, H, Sq, Skv]
        if w.softcap:
            scores = torch.tanh(scores / w.softcap) * w.softcap
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, -1) @ v

    return kernel
