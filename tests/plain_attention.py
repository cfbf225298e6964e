"""Attention written apart from the oracle, with what a kernel can get wrong as keywords."""

import math

import torch

from attn_impls import Workload


def right(w: Workload, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """The mask, from a query's own position i and a key's j."""
    return (j <= i) & (j > i - w.window) if w.window else j <= i


def attend(w, x, dtype=torch.float32, *, kv_head=None, **wrong) -> torch.Tensor:
    """Attention in a dtype, written apart from the oracle, with what mutants get wrong as keywords."""
    masked = scores(w, x, dtype, kv_head=kv_head, **wrong)
    return torch.softmax(masked, -1).nan_to_num(0.0) @ x.v[:, _heads(w, kv_head)].to(dtype)


def _heads(w, kv_head=None):
    return [kv_head(w, h) if kv_head else h * w.kv_heads // w.heads for h in range(w.heads)]


def scores(w, x, dtype=torch.float32, *, factor=1.0, sees=right, kv_head=None, cap=True, dropped=()) -> torch.Tensor:
    """The same before its softmax: [B, H, Sq, Skv], -inf where a query does not see a key."""
    found = x.q.to(dtype) @ x.k[:, _heads(w, kv_head)].to(dtype).mT * (factor / math.sqrt(w.scale_dim))
    if w.softcap and cap:
        found = torch.tanh(found / w.softcap) * w.softcap
    i, j = torch.arange(w.kv_len - w.q_len, w.kv_len)[:, None], torch.arange(w.kv_len)[None, :]
    visible = sees(w, i, j) if w.causal else (j >= 0).expand(w.q_len, -1)
    for tile in dropped:
        visible = visible & (j // 64 != tile)
    return found.masked_fill(~visible, -math.inf)
