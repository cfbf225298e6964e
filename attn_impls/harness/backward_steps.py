"""A backward pass in steps that can be replaced one by one, behind the forward pass of `steps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..registry import Kernel
from ..workload import Workload
from . import steps
from .steps import Steps, right_mask

Gradients = tuple[Tensor, Tensor, Tensor]


def expanded(w: Workload, kv: Tensor, kv_head: Callable[[Workload, int], int]) -> Tensor:
    return kv[:, [kv_head(w, h) for h in range(w.heads)]]


def summed(w: Workload, per_head: Tensor) -> Tensor:
    """[B, H, Skv, D] → [B, KV, Skv, D]."""
    return per_head.unflatten(1, (w.kv_heads, w.group)).sum(2)


def right_slope(w: Workload, capped: Tensor) -> Tensor | float:
    return 1 - (capped / w.softcap).square() if w.softcap else 1.0


@dataclass(frozen=True)
class BackwardSteps:
    """q, k, v, out, dout → recomputed scores (× factor) and weights → dp, δ → ds → dq, dk, dv, on bhsd tensors.

    In float32, or in float64 on float64 inputs.
    """

    kv_head: Callable[[Workload, int], int] = lambda w, h: h // w.group
    mask: steps.Where = right_mask
    factor: float = 1.0
    weights: Callable[[Workload, Tensor], Tensor] = steps.right_weights
    dout: Callable[[Workload, Tensor], Tensor] = lambda _w, dout: dout
    delta: Callable[[Workload, Tensor], Tensor] = lambda _w, delta: delta  # [B, H, Sq, 1]
    slope: Callable[[Workload, Tensor], Tensor | float] = right_slope
    ds: Callable[[Workload, Tensor], Tensor] = lambda _w, ds: ds
    ds_of_dq: Callable[[Tensor, Tensor], Tensor] = lambda ds, _softmax_term: ds
    dq: Callable[[Workload, Tensor, Tensor], Tensor] = lambda w, ds, k: ds @ k * w.scale
    dk: Callable[[Workload, Tensor, Tensor], Tensor] = lambda w, ds, q: ds.mT @ q * w.scale  # per query head
    dv: Callable[[Workload, Tensor, Tensor], Tensor] = lambda _w, p, dout: p.mT @ dout  # per query head
    reduce: Callable[[Workload, Tensor], Tensor] = summed
    after: Callable[[Workload, Tensor, Tensor, Tensor], Gradients] = lambda _w, dq, dk, dv: (dq, dk, dv)

    def __call__(self, w: Workload, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> Gradients:
        given = q.dtype
        dtype = torch.float64 if given == torch.float64 else torch.float32
        q, k, v, out, dout = (t.to(dtype) for t in (q, k, v, out, self.dout(w, dout)))
        k, v = (expanded(w, t, self.kv_head) for t in (k, v))
        i = torch.arange(w.q_len, device=q.device)[:, None] + w.offset
        visible = self.mask(w, i, torch.arange(w.kv_len, device=q.device)[None, :])
        capped = steps.right_cap(w, q @ k.mT * (w.scale * self.factor), visible)
        p = self.weights(w, capped.masked_fill(~visible, -math.inf))
        delta = self.delta(w, (dout * out).sum(-1, keepdim=True))
        ds = self.ds(w, p * (dout @ v.mT - delta) * self.slope(w, capped))
        ds_of_dq = self.ds_of_dq(ds, p * delta * self.slope(w, capped))
        dk, dv = self.reduce(w, self.dk(w, ds, q)), self.reduce(w, self.dv(w, p, dout))
        dq, dk, dv = self.after(w, self.dq(w, ds_of_dq, k), dk, dv)
        return dq.to(given), dk.to(given), dv.to(given)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Workload, backward: Callable[..., Gradients], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = Steps()(w, q, k, v)
        ctx.w, ctx.backward_steps = w, backward
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.backward_steps(ctx.w, *ctx.saved_tensors, dout)


def broken(**wrong: Any) -> Callable[[Workload], Kernel]:
    """A builder of attention whose backward pass has some steps replaced."""
    backward = replace(BackwardSteps(), **wrong)
    return lambda w: lambda q, k, v: _Attention.apply(w, backward, q, k, v)
