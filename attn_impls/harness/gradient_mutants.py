"""Deliberately broken backward passes: what the check of gradients is tested with. The forward pass of each is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import Kernel
from ..workload import Workload
from . import steps
from .backward_steps import Gradients, broken, summed
from .mutants import Mutant, bf16, fp16, swap, wide
from .steps import TILE, right_mask

# Masks of the recomputed scores


def also(*where: Any) -> Callable[[Workload], Kernel]:
    return broken(mask=steps.more_keys(*where))


def but(*where: Any) -> Callable[[Workload], Kernel]:
    return broken(mask=steps.fewer_keys(*where))


MASKS = [
    Mutant("backward: causal missing", "flag not passed on", also(lambda _w, _i, j: j >= 0)),
    Mutant("backward: causal one key more", "j <= i + 1", also(lambda _w, i, j: j == i + 1)),
    Mutant("backward: causal one key less", "j < i", but(lambda _w, i, j: j == i, "causal")),
    Mutant("backward: causal top-left", "offset forgotten", broken(mask=lambda w, i, j: right_mask(w, i - w.offset, j))),
    Mutant("backward: causal by tiles only", "diagonal tile not masked", also(lambda _w, i, j: j // TILE <= i // TILE)),
    Mutant("backward: window missing", "flag not passed on", also(lambda _w, i, j: j <= i, "window")),
    Mutant("backward: window one key more", "j >= i - window", also(lambda w, i, j: j == i - w.window, "window")),
    Mutant("backward: window one key less", "(window - 2, 0)", but(lambda w, i, j: j == i - w.window + 1, "window")),
    Mutant("backward: window without the offset", "query index for position", broken(mask=steps.without_offset)),
    Mutant("backward: window rounded up to 16", "tiles of 16 keys", broken(mask=steps.coarse_window)),
    Mutant("backward: causal missing for few queries", "taken for decoding", also(steps.few_queries)),
    Mutant("backward: first key dropped", "a loop from 1", but(lambda _w, _i, j: j == 0)),
    Mutant("backward: last key tile dropped", "kv_len // 64 tiles", but(lambda w, _i, j: j >= (w.kv_len - 1) // TILE * TILE)),
]

# Scores and the softmax


def neighbours_lse(w: Workload, scores: Tensor) -> Tensor:
    """The first row of each tile but the first is normalised by the row before's log-sum-exp."""
    lse = scores.logsumexp(-1, keepdim=True).clamp(min=-1e30)
    first = (torch.arange(w.q_len, device=scores.device) % TILE == 0)[:, None]
    used = torch.where(first, torch.cat([lse[..., :1, :], lse[..., :-1, :]], -2), lse)
    return torch.where(scores.isinf(), 0.0, (scores - used).clamp(max=80).exp())


def slope_of_root(w: Workload, capped: Tensor) -> Tensor | float:
    return 1 - (capped / w.softcap).abs() if w.softcap else 1.0


def blind_nan(_w: Workload, scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def lse_low(_w: Workload, scores: Tensor) -> Tensor:
    """The log-sum-exp kept in bf16 between the passes."""
    lse = bf16(scores.logsumexp(-1, keepdim=True).clamp(min=-1e30))
    return torch.where(scores.isinf(), 0.0, (scores - lse).exp())


def rolled(delta: Tensor) -> Tensor:
    return delta.roll(1, 2)


SCORES = [
    Mutant("backward: scale × 1.02", "another constant than forward's", broken(factor=1.02)),
    Mutant("dQ unscaled", "scale forgotten", broken(dq=lambda _w, ds, k: ds @ k)),
    Mutant("dK unscaled", "scale forgotten", broken(dk=lambda _w, ds, q: ds.mT @ q)),
    Mutant("dQ scaled twice", "scale in k and in the epilogue", broken(dq=lambda w, ds, k: ds @ k * w.scale**2)),
    Mutant("dK scaled by log2(e)", "q kept for exp2", broken(dk=lambda w, ds, q: ds.mT @ q * (w.scale * math.log2(math.e)))),
    Mutant("softmax term missing", "δ never subtracted", broken(delta=lambda _w, delta: 0 * delta)),
    Mutant("softmax term of the row before", "δ's row index", broken(delta=lambda _w, delta: rolled(delta))),
    Mutant("softmax term of the head before", "δ's head index", broken(delta=lambda _w, delta: swap(delta, 1))),
    Mutant("softmax term doubled", "preprocessed twice", broken(delta=lambda _w, delta: 2 * delta)),
    Mutant("dQ misses the softmax term", "δ subtracted for dK only", broken(ds_of_dq=lambda ds, term: ds + term)),
    Mutant("softcap's slope missing", "chain rule", broken(slope=lambda _w, _s: 1.0)),
    Mutant("softcap's slope of the root", "1 - |tanh|", broken(slope=slope_of_root)),
    Mutant("lse of a neighbour", "row index past a tile boundary", broken(weights=neighbours_lse)),
    Mutant("backward: blind rows 0 / 0", "rows that see nothing", broken(weights=blind_nan)),
]

# Sums over queries, keys and heads


def last_of_group(w: Workload, per_head: Tensor) -> Tensor:
    return per_head.unflatten(1, (w.kv_heads, w.group))[:, :, -1]


def without_queries(gone: Callable[[Workload, Tensor], Tensor]) -> Callable[[Workload, Tensor], Tensor]:
    """ds or p of some queries left out."""

    def step(w: Workload, ds: Tensor) -> Tensor:
        rows = torch.arange(w.q_len, device=ds.device)[:, None]
        return torch.where(gone(w, rows), 0.0, ds)

    return step


def first_tile(_w: Workload, rows: Tensor) -> Tensor:
    return rows < TILE


def last_tile(w: Workload, rows: Tensor) -> Tensor:
    return rows >= (w.q_len - 1) // TILE * TILE


def dk_without(gone: Callable[[Workload, Tensor], Tensor]) -> Callable[[Workload], Kernel]:
    step = without_queries(gone)
    return broken(dk=lambda w, ds, q: step(w, ds).mT @ q * w.scale)


def dv_without(gone: Callable[[Workload, Tensor], Tensor]) -> Callable[[Workload], Kernel]:
    step = without_queries(gone)
    return broken(dv=lambda w, p, dout: step(w, p).mT @ dout)


def dq_without_last_keys(w: Workload, ds: Tensor, k: Tensor) -> Tensor:
    """The last tile of keys never adds its part to dq."""
    kept = (w.kv_len - 1) // TILE * TILE
    return ds[..., :kept] @ k[..., :kept, :] * w.scale


SUMS = [
    Mutant("dK of the last query head of each group", "stored, not added", broken(reduce=last_of_group)),
    Mutant("dK and dV averaged over the group", "mean for sum", broken(reduce=lambda w, x: summed(w, x) / w.group)),
    Mutant("backward: GQA map h % kv", "interleaved heads", broken(kv_head=lambda w, h: h % w.kv_heads)),
    Mutant(
        "dK and dV summed over h % kv",
        "interleaved heads",
        broken(reduce=lambda w, x: x.unflatten(1, (w.group, w.kv_heads)).sum(1)),
    ),
    Mutant("dK without the first query tile", "loop bounds", dk_without(first_tile)),
    Mutant("dK without the last query tile", "q_len // 64 tiles", dk_without(last_tile)),
    Mutant("dV without the last query tile", "q_len // 64 tiles", dv_without(last_tile)),
    Mutant("dV without the last query", "i < q_len - 1", dv_without(lambda w, rows: rows == w.q_len - 1)),
    Mutant("dQ without the last key tile", "an atomic add lost", broken(dq=dq_without_last_keys)),
    Mutant(
        "dQ's last key tile twice",
        "an atomic add repeated",
        broken(dq=lambda w, ds, k: 2 * (ds @ k * w.scale) - dq_without_last_keys(w, ds, k)),
    ),
]

# Indices and outputs

After = Callable[[Workload, Tensor, Tensor, Tensor], Gradients]


def finally_(after: After) -> Callable[[Workload], Kernel]:
    return broken(after=after)


def unwritten(gradient: Tensor) -> Tensor:
    """The last tile's rows never written."""
    rows = torch.arange(gradient.shape[2], device=gradient.device)[:, None]
    return torch.where(rows >= (gradient.shape[2] - 1) // TILE * TILE, 0.0, gradient)


def spoiled(gradient: Tensor, value: float) -> Tensor:
    gradient = gradient.clone()
    gradient[-1, -1, -1, 0] = value
    return gradient


def remembering(which: int) -> Callable[[Workload], Kernel]:
    """dK is that of another call: -2 the previous one, 0 the first."""

    def build(w: Workload) -> Kernel:
        dks: list[Tensor] = []

        def after(_w: Workload, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
            dks.append(dk)
            return dq, dks[max(which, -len(dks))], dv

        return broken(after=after)(w)

    return build


def columns_not_cleared(w: Workload) -> Kernel:
    """The last columns of dQ are added to what the previous call left in the accumulator."""
    left: list[Tensor] = []

    def after(_w: Workload, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
        left.append(dq.clone())
        if len(left) > 1:
            dq[..., -8:] += left[-2][..., -8:]
        return dq, dk, dv

    return broken(after=after)(w)


def swapped_dk_dv(w: Workload, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    return (dq, dv, dk) if w.head_dim == w.v_head_dim else (dq, dk, dv)


def row_by_row(_w: Workload, dout: Tensor) -> Tensor:
    """Each row of dout divided by its largest value, and multiplied again."""
    most = dout.abs().amax(-1, keepdim=True)
    return dout / most * most


OUTPUTS = [
    Mutant("dK and dV swapped", "order of the outputs", finally_(swapped_dk_dv)),
    Mutant("two heads' dQ swapped", "head index", finally_(lambda _w, dq, dk, dv: (swap(dq, 1), dk, dv))),
    Mutant("two heads' dV swapped", "head index", finally_(lambda _w, dq, dk, dv: (dq, dk, swap(dv, 1)))),
    Mutant("two rows of dK swapped", "row index", finally_(lambda _w, dq, dk, dv: (dq, swap(dk, 2), dv))),
    Mutant("dK's batch index mixed", "batch stride", finally_(lambda _w, dq, dk, dv: (dq, dk.roll(1, 0), dv))),
    Mutant("dQ's last tile unwritten", "q_len // 64 tiles", finally_(lambda _w, dq, dk, dv: (unwritten(dq), dk, dv))),
    Mutant("dK's last tile unwritten", "kv_len // 64 tiles", finally_(lambda _w, dq, dk, dv: (dq, unwritten(dk), dv))),
    Mutant("previous call's dK", "a buffer returned too early", remembering(-2)),
    Mutant("first call's dK", "a graph captured once", remembering(0)),
    Mutant("dQ's last columns not cleared", "head dim padded to 80, an accumulator of 96 (flash-attn 4)", columns_not_cleared),
    Mutant("zero dV", "never launched", finally_(lambda _w, dq, dk, dv: (dq, dk, torch.zeros_like(dv)))),
    Mutant("one NaN in dK", "0 / 0", finally_(lambda _w, dq, dk, dv: (dq, spoiled(dk, math.nan), dv))),
    Mutant("one infinity in dQ", "overflow", finally_(lambda _w, dq, dk, dv: (spoiled(dq, math.inf), dk, dv))),
    Mutant("dQ × 0.99", "a constant", finally_(lambda _w, dq, dk, dv: (0.99 * dq, dk, dv)), lambda w: w.q_len > 1),
    Mutant("dout of two heads swapped", "head index", broken(dout=lambda _w, dout: swap(dout, 1))),
    Mutant("dout of two rows swapped", "row index", broken(dout=lambda _w, dout: swap(dout, 2))),
    Mutant("dout × 0.98", "loss scale applied twice", broken(dout=lambda _w, dout: 0.98 * dout)),
    Mutant("0 / 0 where a row of dout is zero", "scaled row by row", broken(dout=row_by_row)),
]

# Rounding: worse than the workload's dtype, undeclared


def many_terms(w: Workload) -> bool:
    return w.causal and w.group * (w.q_len - w.blind_rows) >= 256 and w.dtype != torch.float32


def added_low(w: Workload, p: Tensor, dout: Tensor) -> Tensor:
    """dV added up over the queries in the workload's dtype."""
    total = torch.zeros_like(p[..., :1, :].mT * dout[..., :1, :])
    for i in range(w.q_len):
        total = steps.rounded(torch.addcmul(total, p[..., i : i + 1, :].mT, dout[..., i : i + 1, :]), w.dtype)
    return total


ROUNDING = [
    Mutant("dV added up in the dtype", "16-bit accumulator", broken(dv=added_low), many_terms),
    Mutant("dout through fp16", "no room for its range", broken(dout=lambda _w, x: fp16(x)), wide),
    Mutant("ds through fp16", "no room for its range", broken(ds=lambda _w, ds: fp16(ds)), wide),
    Mutant("small ds flushed", "|ds| < 1e-6 taken for 0", broken(ds=lambda _w, ds: torch.where(ds.abs() < 1e-6, 0.0, ds)), wide),
    Mutant("ds through fp8", "an undeclared quantisation", broken(ds=lambda _w, ds: steps.quantised(ds)), lambda _w: True),
    Mutant("dout through fp8", "an undeclared quantisation", broken(dout=lambda _w, x: steps.quantised(x)), lambda _w: True),
    Mutant("lse through bf16", "kept in the dtype", broken(weights=lse_low), lambda w: w.dtype != torch.bfloat16),
    Mutant("ds through bf16", "a cast", broken(ds=lambda _w, ds: bf16(ds)), lambda w: w.dtype == torch.float32),
]

GRADIENT_MUTANTS = [*MASKS, *SCORES, *SUMS, *OUTPUTS, *ROUNDING]
