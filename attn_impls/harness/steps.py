"""Attention in replaceable steps, on which the mutants are built: any one step can be swapped for a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..workload import Workload

TILE = 64


def right_mask(w: Workload, i: Tensor, j: Tensor) -> Tensor:
    """Which keys j [1, Skv] a query at position i [Sq, 1] among the keys sees, [Sq, Skv]."""
    if not w.causal:
        return (i == i) & (j == j)
    return (j <= i) & (j > i - w.window) if w.window else j <= i


Where = Callable[[Workload, Tensor, Tensor], Tensor]


def more_keys(where: Where, needs: str = "causal") -> Where:
    """The right mask and some keys more, on workloads that have what it `needs`."""
    return lambda w, i, j: right_mask(w, i, j) | (where(w, i, j) & bool(getattr(w, needs)))


def fewer_keys(where: Where, needs: str = "kv_len") -> Where:
    """The right mask without some keys, on workloads that have what it `needs`."""
    return lambda w, i, j: right_mask(w, i, j) & ~(where(w, i, j) & bool(getattr(w, needs)))


def without_offset(w: Workload, i: Tensor, j: Tensor) -> Tensor:
    """A window by the query's index, not by its position among the keys."""
    return (j <= i) & (j > i - w.offset - w.window) if w.window else right_mask(w, i, j)


def coarse_window(w: Workload, i: Tensor, j: Tensor) -> Tensor:
    """A window rounded up to 16 keys."""
    return right_mask(w.replace(window=-(-w.window // 16) * 16), i, j)


def few_queries(w: Workload, _i: Tensor, j: Tensor) -> Tensor:
    """Every key, for as few queries as are packed for decoding."""
    return (j >= 0) & (1 < w.q_len <= 16)


def right_cap(w: Workload, scores: Tensor, _visible: Tensor) -> Tensor:
    return torch.tanh(scores / w.softcap) * w.softcap if w.softcap else scores


def exp(x: Tensor) -> Tensor:
    """exp with float32's overflow and (to zero, as GPUs do) underflow, in float64 too."""
    return torch.where(x > 88.72, math.inf, torch.where(x < -87.33, 0.0, x.exp()))


def peak(scores: Tensor) -> Tensor:
    """Each row's maximum, [..., Sq, 1]; 0 for rows that see nothing."""
    return scores.amax(-1, keepdim=True).clamp(min=-1e30)


def normalised(weights: Tensor, total: Tensor | None = None) -> Tensor:
    """Weights over their sum (or another total); rows without any stay 0, as those that see nothing should."""
    total = weights.sum(-1, keepdim=True) if total is None else total
    return torch.where((weights == 0).all(-1, keepdim=True), 0.0, weights / total)


def right_weights(_w: Workload, scores: Tensor) -> Tensor:
    """Softmax of masked scores [B, H, Sq, Skv]."""
    return normalised(exp(scores - peak(scores)))


@dataclass(frozen=True)
class Steps:
    """Inputs → scores (× factor) → cap → mask → weights → product with V → after, on bhsd tensors.

    In float32, or in float64 on float64 inputs, which shows whether a wrong step changes anything beyond rounding.
    """

    inputs: Callable[[Workload, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = lambda _w, q, k, v: (q, k, v)
    kv_head: Callable[[Workload, int], int] = lambda w, h: h // w.group
    factor: Callable[[Workload], float] = lambda _w: 1.0
    cap: Callable[[Workload, Tensor, Tensor], Tensor] = right_cap
    mask: Where = right_mask
    hidden: float = -math.inf
    weights: Callable[[Workload, Tensor], Tensor] = right_weights
    product: Callable[[Workload, Tensor, Tensor], Tensor] = lambda _w, weights, v: weights @ v
    after: Callable[[Workload, Tensor], Tensor] = lambda _w, out: out

    def __call__(self, w: Workload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = q.dtype
        dtype = torch.float64 if given == torch.float64 else torch.float32
        q, k, v = self.inputs(w, q.to(dtype), k.to(dtype), v.to(dtype))
        heads = [self.kv_head(w, h) for h in range(w.heads)]
        k, v = k[:, heads], v[:, heads]
        i = torch.arange(w.q_len, device=q.device)[:, None] + w.offset
        visible = self.mask(w, i, torch.arange(w.kv_len, device=q.device)[None, :])
        scores = self.cap(w, q @ k.mT * (w.scale * self.factor(w)), visible)
        weights = self.weights(w, scores.masked_fill(~visible, self.hidden))
        return self.after(w, self.product(w, weights, v)).to(given)


# Wrong softmaxes


def unshifted(_w: Workload, scores: Tensor) -> Tensor:
    weights = exp(scores)
    return normalised(weights)


def clamped(most: float) -> Callable[[Workload, Tensor], Tensor]:
    """No score above `most`."""

    def weights(w: Workload, scores: Tensor) -> Tensor:
        return right_weights(w, torch.where(scores.isinf(), scores, scores.clamp(max=most)))

    return weights


def peak_from_zero(_w: Workload, scores: Tensor) -> Tensor:
    """Rows whose weights all underflow come out as 0 / 0."""
    weights = exp(scores - peak(scores).clamp(min=0))
    blind = scores.isinf().all(-1, keepdim=True)
    return torch.where(blind, 0.0, weights / weights.sum(-1, keepdim=True))


def peak_of_padding(w: Workload, scores: Tensor) -> Tensor:
    """The same where the last tile has keys past the end, whose scores of 0 the maximum is taken over."""
    return peak_from_zero(w, scores) if w.kv_len % TILE else right_weights(w, scores)


def peak_of_half_tiles(_w: Workload, scores: Tensor) -> Tensor:
    """The maximum taken over the first 32 keys of each tile only."""
    known = torch.arange(scores.shape[-1], device=scores.device) % TILE < TILE // 2
    return normalised(exp(scores - peak(scores.masked_fill(~known, -math.inf)).clamp(min=-100)))


def peak_of_query_tile(_w: Workload, scores: Tensor) -> Tensor:
    """One maximum for 64 queries: the others' weights underflow."""
    most = torch.cat([part.amax(-2, keepdim=True).expand_as(part) for part in peak(scores).split(TILE, -2)], -2)
    weights = exp(scores - most)
    blind = scores.isinf().all(-1, keepdim=True)
    return torch.where(blind, 0.0, weights / weights.sum(-1, keepdim=True))


def neighbours_peak(_w: Workload, scores: Tensor) -> Tensor:
    """The first row of each tile but the first scales its weights by the row before's maximum, their sum by its own."""
    most = peak(scores)
    first = (torch.arange(scores.shape[-2], device=scores.device) % TILE == 0)[:, None]
    used = torch.where(first, torch.cat([most[..., :1, :], most[..., :-1, :]], -2), most)
    return normalised(exp(scores - used), exp(scores - most).sum(-1, keepdim=True))


def running_peak(scores: Tensor) -> Tensor:
    """The maximum that online softmax knows when it is at each key's tile, [..., Sq, Skv]."""
    most = torch.stack([tile.amax(-1) for tile in scores.split(TILE, -1)], -1).cummax(-1).values.clamp(min=-1e30)
    return most.repeat_interleave(TILE, -1)[..., : scores.shape[-1]]


def accumulator_not_rescaled(_w: Workload, scores: Tensor) -> Tensor:
    return normalised(exp(scores - running_peak(scores)), exp(scores - peak(scores)).sum(-1, keepdim=True))


def total_not_rescaled(_w: Workload, scores: Tensor) -> Tensor:
    return normalised(exp(scores - peak(scores)), exp(scores - running_peak(scores)).sum(-1, keepdim=True))


def light_tiles_skipped(_w: Workload, scores: Tensor) -> Tensor:
    """Tiles whose largest weight is below 2⁻⁸ of the maximum so far are taken for nothing."""
    tile = torch.cat([t.amax(-1, keepdim=True).expand_as(t) for t in scores.split(TILE, -1)], -1)
    return normalised(torch.where(tile < running_peak(scores) - 8 * math.log(2), 0.0, exp(scores - peak(scores))))


def padding_counted(w: Workload, scores: Tensor) -> Tensor:
    """The last tile's keys past the end, zero-filled, have score 0."""
    most, padding = peak(scores), -w.kv_len % TILE
    most = most.clamp(min=0) if padding else most
    weights = exp(scores - most)
    return normalised(weights, weights.sum(-1, keepdim=True) + padding * exp(-most))


def unnormalised(_w: Workload, scores: Tensor) -> Tensor:
    return exp(scores - peak(scores))


def tile_twice(_w: Workload, scores: Tensor) -> Tensor:
    """The middle tile of keys visited twice."""
    tiles = torch.arange(scores.shape[-1], device=scores.device) // TILE
    weights = exp(scores - peak(scores))
    return normalised(torch.where(tiles == (int(tiles[-1]) + 1) // 2, 2 * weights, weights))


def splits_averaged(w: Workload, scores: Tensor) -> Tensor:
    """Two splits of the keys, each normalised by itself, merged without their log-sum-exp."""
    if w.kv_len < 2:
        return right_weights(w, scores)
    parts = [right_weights(w, part) for part in scores.tensor_split(2, -1)]
    seeing = sum((part != 0).any(-1, keepdim=True).to(part.dtype) for part in parts)
    return torch.cat(parts, -1) / torch.as_tensor(seeing).clamp(min=1)


def last_split_lost(w: Workload, scores: Tensor) -> Tensor:
    """The weights are those of all keys, but the last of eight splits is never added."""
    weights = right_weights(w, scores)
    return weights * (torch.arange(w.kv_len, device=scores.device) < w.kv_len - w.kv_len // 8)


def dropout(w: Workload, scores: Tensor) -> Tensor:
    weights = right_weights(w, scores)
    keep = torch.rand(w.kv_len, generator=torch.Generator().manual_seed(0)) > 0.02
    return weights * keep.to(scores.device) / 0.98


# Wrong rounding


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def summed_low(w: Workload, weights: Tensor, v: Tensor) -> Tensor:
    """The output accumulated in the workload's dtype, key by key."""
    out = torch.zeros_like(weights[..., :1] * v[..., :1, :])
    for n in range(w.kv_len):
        out = rounded(torch.addcmul(out, weights[..., n : n + 1], v[..., n : n + 1, :]), w.dtype)
    return out


def total_summed_low(w: Workload, scores: Tensor) -> Tensor:
    """The softmax's denominator accumulated in the workload's dtype, key by key."""
    weights = exp(scores - peak(scores))
    total = torch.zeros_like(weights[..., 0])
    for column in weights.unbind(-1):
        total = rounded(total + column, w.dtype)
    return normalised(weights, total[..., None])


def quantised(x: Tensor) -> Tensor:
    """Through float8 e4m3 with a scale per tensor."""
    step = x.abs().amax().clamp(min=1e-30) / 448
    return (x / step).float().to(torch.float8_e4m3fn).to(x.dtype) * step


def tf32(x: Tensor) -> Tensor:
    """Rounded to TF32's 10 bits."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def cut(x: Tensor) -> Tensor:
    """Truncated to bf16's 7 bits."""
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(x.dtype)
