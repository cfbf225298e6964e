"""Attention written apart from the oracle, with what a kernel can get wrong as keywords."""

import math

import torch

from attn_impls import Workload


def right(w: Workload, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """The mask, from a query's own position i and a key's j."""
    return (j <= i) & (j > i - w.window) if w.window else j <= i


def attend(w, x, dtype=torch.float32, *, factor=1.0, sees=right, kv_head=None, cap=True, dropped=()) -> torch.Tensor:
    """Attention in a dtype, written apart from the oracle, with what mutants get wrong as keywords."""
    heads = [kv_head(w, h) if kv_head else h * w.kv_heads // w.heads for h in range(w.heads)]
    q, k, v = x.q.to(dtype), x.k[:, heads].to(dtype), x.v[:, heads].to(dtype)
    scores = q @ k.mT * (factor / math.sqrt(w.scale_dim))
    if w.softcap and cap:
        scores = torch.tanh(scores / w.softcap) * w.softcap
    i, j = torch.arange(w.kv_len - w.q_len, w.kv_len)[:, None], torch.arange(w.kv_len)[None, :]
    visible = sees(w, i, j) if w.causal else (j >= 0).expand(w.q_len, -1)
    for tile in dropped:
        visible = visible & (j // 64 != tile)
    return torch.softmax(scores.masked_fill(~visible, -math.inf), -1).nan_to_num(0.0) @ v
