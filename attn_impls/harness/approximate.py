"""The class of approximate kernels: what products of few bits do to each row, by the arithmetic that a kernel declares."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from ..workload import Workload
from .inputs import Inputs
from .oracle import TOLERANCE, Reference, chunks, empty, moved, stretches


class Arithmetic(NamedTuple):
    """The precision of the operands of q·kᵀ and of p·v; sums and softmax are in float32."""

    qk: str
    pv: str


# what `approximate=` may name; FlashAttention-3's fp8 and SageAttention are the models
ARITHMETIC = {"int8": Arithmetic("int8", "fp16"), "fp8": Arithmetic("fp8", "fp8")}
FLOATS = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
BLOCK = 128  # tokens of a head that share one scale, at most
P_SCALE = 256.0  # a row's largest weight before it is rounded, so that the small ones do not vanish


def loosened(w: Workload, inputs: Inputs, known: Reference, approximate: bool | str) -> Reference:
    """`known` with the budget and the drift of a class: the dtype's, and what the declared arithmetic adds to it.

    approximate: the class, True for the loosest of each row, False for `known` itself.
    """
    names = (list(ARITHMETIC) if approximate is True else [approximate]) if approximate else []
    allowed = [_allowed(w, inputs, known, ARITHMETIC[name]) for name in names]
    if not allowed:
        return known
    budgets, drifts = zip(*allowed, strict=True)
    return dataclasses.replace(known, budget=torch.stack(budgets).amax(0), drift=max(drifts))


def _allowed(w: Workload, inputs: Inputs, known: Reference, declared: Arithmetic) -> tuple[torch.Tensor, float]:
    """The budget of each row [B, H, R] and the drift.

    A row may err by TOLERANCE times the root mean square, or more where one score's error decides: that is a sum over
    head_dim, so normal, and has no bound. Of N rows that n scores decide, the unluckiest is off by 1 + √(2 ln N / n) times.
    """
    sigma, deciding, plain = _quantised(w, inputs, known, declared)
    rows = known.norm.numel()
    own = sigma / known.norm * (1 + (2 * math.log(rows) / deciding).sqrt()).clamp(min=TOLERANCE)
    off = stretches(plain, known.out, known.norm)
    # rows of a KV head share the errors of its keys and values: their mean need not shrink with their number
    heads = off.unflatten(1, (w.kv_heads, w.group)).mean((2, 3))
    chance = max(float(off.square().mean() / rows) ** 0.5, float(heads.square().mean() / heads.numel()) ** 0.5)
    return known.budget + own, known.drift + TOLERANCE * abs(float(off.mean())) + 4 * chance


def _quantised(
    w: Workload, inputs: Inputs, known: Reference, declared: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """To first order, the root mean square of the error that the arithmetic makes in each row [B, H, R], in the units of
    out; the number of scores that decide it [B, H, R]; and one plain run in that arithmetic [B, H, R, DV].

    Rounding q and k moves a score by a variance σ², which moves the output by p·σ·(v − out); rounding p and v moves it by
    their own errors times v and p. Independent errors add in squares.
    """
    q, k, v = (tensor.double() for tensor in inputs)
    noise = [_variance(tensor, declared.qk) for tensor in (q, k)] + [_variance(v, declared.pv)]
    of_q = torch.cat([noise[0], q.square()], -1).unflatten(1, (w.kv_heads, w.group)).flatten(0, 1)  # [B·KV, G, Sq, 2·D]
    of_k = torch.cat([k.square(), noise[1]], -1).flatten(0, 1)[:, None]  # [B·KV, 1, Skv, 2·D]
    of_v = noise[2].sum(-1).flatten(0, 1)[:, None, :, None]  # [B·KV, 1, Skv, 1]
    of_q = of_q if known.rows is None else of_q[:, :, known.rows]
    sigma = torch.empty(of_q.shape[:3], dtype=torch.float64, device=q.device)
    deciding = torch.empty_like(sigma)
    outs = empty(w, inputs, known.rows, torch.float64)
    exact = known.out.reshape(outs.shape)
    rounded = Inputs(_rounded(q, declared.qk), _rounded(k, declared.qk), v)
    for (where, scores, weights, values), (_, _, coarse, _) in zip(
        chunks(w, inputs, known.rows, torch.float64, "scores"),
        chunks(w, rounded, known.rows, torch.float64, "scores"),
        strict=True,
    ):
        variance = (of_q[where] @ of_k[where[0]].mT) * w.scale**2
        if w.softcap:  # the cap's slope
            variance *= (1 - (scores / w.softcap).square()).square()
        spread = weights.square() * variance
        squares = moved(spread, values, exact[where])
        several = (spread.sum(-1) / spread.amax(-1)).nan_to_num_(1.0)
        deciding[where] = (several - 1).clamp(1, w.head_dim)  # weights sum to one, so of two scores one difference counts
        largest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        of_p = _variance(weights / largest * P_SCALE, declared.pv) * (largest / P_SCALE) ** 2
        squares += (of_p @ values.square().sum(-1, keepdim=True) + weights.square() @ of_v[where[0]])[..., 0]
        sigma[where] = squares.clamp(min=0).sqrt()
        outs[where] = (_rounded(coarse / largest * P_SCALE, declared.pv) * (largest / P_SCALE)) @ _rounded(values, declared.pv)
    shape = known.norm.shape
    return sigma.reshape(shape), deciding.reshape(shape), outs.reshape(known.out.shape)


def _variance(x: torch.Tensor, precision: str) -> torch.Tensor:
    """The mean square of the error that rounding makes in each element of x [..., S, D]."""
    if precision == "int8":
        return (_step(x).square() / 12).expand_as(x)
    kind = torch.finfo(FLOATS[precision])
    return (x.abs() * (kind.eps / 2)).clamp(min=kind.smallest_normal * kind.eps / 2).square() / 3 * (x != 0)


def _rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """x [..., S, D] as the precision holds it; int8 and fp8 operands are scaled to fill their range."""
    if precision == "int8":
        step = _step(x)
        return (x / step).round() * step
    return x.to(FLOATS[precision]).to(x.dtype)


def _step(x: torch.Tensor) -> torch.Tensor:
    """The step of symmetric int8 for each token of x [..., S, D], one for each BLOCK of them, [..., S, 1]."""
    largest = x.abs().amax(-1)
    padded = torch.nn.functional.pad(largest, (0, -largest.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).amax(-1, keepdim=True).expand(*padded.shape[:-1], -1, BLOCK)
    return (blocks.flatten(-2)[..., : x.shape[-2], None] / 127).clamp(min=torch.finfo(torch.float32).tiny)
