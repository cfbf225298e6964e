"""The class of approximate kernels: what products of few bits do to each row, by the arithmetic that a kernel declares."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from ..workload import Workload
from .inputs import Inputs
from .oracle import TOLERANCE, Reference, chunks, empty, moved, of_group, stretches


class Arithmetic(NamedTuple):
    """The precision of the operands of q·kᵀ and of p·v; sums and softmax are in float32."""

    qk: str
    pv: str


# what `approximate=` may name; FlashAttention-3's fp8 and SageAttention are the models
ARITHMETIC = {"int8": Arithmetic("int8", "fp16"), "fp8": Arithmetic("fp8", "fp8")}
FLOATS = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
BLOCK = 128  # tokens of a head that share one scale, at most


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

    A row may err by TOLERANCE times the root mean square, or more where few errors decide: each is a sum over head_dim, so
    normal, and has no bound. Of N rows that n independent errors decide, the unluckiest is off by 1 + √(2 ln N / n) times.
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
    out; the number of independent errors that decide it [B, H, R]; and one plain run in that arithmetic [B, H, R, DV].

    Rounding q and k moves a score by a variance σ², which moves the output by p·σ·(v − out); rounding p and v moves it by
    their own errors times v and p. Independent errors add in squares. Of what n scores' errors do, a part is in one direction
    and as if a single error did it: (1/√n + 1/√v_head_dim)², as with random matrices (Marchenko and Pastur).
    """
    q, k, v = (tensor.double() for tensor in inputs)
    of_q, of_k, of_v = _noise(w, q, k, v, declared)
    of_q = of_q if known.rows is None else of_q[:, :, known.rows]
    sigma = torch.empty_like(of_q[..., 0], dtype=torch.float64)
    deciding = torch.empty_like(sigma)
    outs = empty(w, inputs, known.rows, torch.float64)
    exact = known.out.reshape(outs.shape)
    rounded = Inputs(_rounded(q, declared.qk), _rounded(k, declared.qk), v)
    for (where, scores, weights, values), (_, _, coarse, _) in zip(
        chunks(w, inputs, known.rows, torch.float64, "scores"),
        chunks(w, rounded, known.rows, torch.float64, "scores"),
        strict=True,
    ):
        variance = of_group(of_q[where], of_k[where[0]].mT) * w.scale**2
        if w.softcap:  # the cap's slope
            variance *= (1 - (scores / w.softcap).square()).square()
        spread = weights.square() * variance
        squares = moved(spread, values, exact[where])
        several = (spread.sum(-1) / spread.amax(-1)).nan_to_num_(1.0)
        free = (several - 1).clamp(1, w.head_dim)  # weights sum to one, so of two scores one difference counts
        deciding[where] = (free.rsqrt() + w.v_head_dim**-0.5).pow(-2).clamp(min=1)
        largest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        of_p = _variance(weights / largest, declared.pv) * largest.square()
        squares += of_group(of_p, values.square().sum(-1, keepdim=True))[..., 0]
        squares += of_group(weights.square(), of_v[where[0]])[..., 0]
        sigma[where] = squares.clamp(min=0).sqrt()
        own = coarse.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        outs[where] = of_group(_rounded(coarse / own, declared.pv) * own, _rounded(values, declared.pv))
    shape = known.norm.shape
    return sigma.reshape(shape), deciding.reshape(shape), outs.reshape(known.out.shape)


def _noise(
    w: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, declared: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of a product's variance, q's [B·KV, G, Sq, 2·D] and k's [B·KV, 1, Skv, 2·D], and the variance of v's rows
    [B·KV, 1, Skv, 1]."""
    of_q = torch.cat([_variance(q, declared.qk), q.square()], -1).unflatten(1, (w.kv_heads, w.group)).flatten(0, 1)
    of_k = torch.cat([k.square(), _variance(k, declared.qk)], -1).flatten(0, 1)[:, None]
    return of_q.float(), of_k.float(), _variance(v, declared.pv).sum(-1).flatten(0, 1)[:, None, :, None]


def _variance(x: torch.Tensor, precision: str) -> torch.Tensor:
    """The mean square of the error that rounding makes in each element of x [..., S, D]."""
    unit = _unit(x, precision)
    if precision == "int8":
        return (unit.square() / 12).expand_as(x)
    kind = torch.finfo(FLOATS[precision])
    error = (x / unit).abs().clamp(min=kind.smallest_normal) * (kind.eps / 2)
    return (error * unit).square() / 3 * (x != 0)


def _rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """x [..., S, D] as the precision holds it."""
    unit = _unit(x, precision)
    return (x / unit).round() * unit if precision == "int8" else (x / unit).to(FLOATS[precision]).to(x.dtype) * unit


def _unit(x: torch.Tensor, precision: str) -> torch.Tensor:
    """What x [..., S, D] is divided by to fill the precision's range: int8 for each BLOCK of tokens, fp8 for all of a head,
    fp16 not at all."""
    if precision == "fp16":
        return torch.ones_like(x[..., :1, :1])
    largest = x.abs().amax(-1)
    if precision == "fp8":
        unit = largest.amax(-1, keepdim=True)[..., None] / torch.finfo(FLOATS[precision]).max
    else:
        padded = torch.nn.functional.pad(largest, (0, -largest.shape[-1] % BLOCK))
        blocks = padded.unflatten(-1, (-1, BLOCK)).amax(-1, keepdim=True).expand(*padded.shape[:-1], -1, BLOCK)
        unit = blocks.flatten(-2)[..., : x.shape[-2], None] / 127
    return unit.clamp(min=torch.finfo(torch.float32).tiny)
