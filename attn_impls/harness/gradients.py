"""The judge of gradients: dq, dk and dv in float64, and how much error the workload's own dtype excuses, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..workload import Workload
from .inputs import Inputs
from .oracle import LSES, PLAIN, TOLERANCE, Reference, budgeted, lse, score_error

# Of the honest error, as TOLERANCE for outputs: a backward pass makes five products for two, and many kernels round dk and dv
# after each block of queries or each head of a group.
BACKWARD_TOLERANCE = 1.5 * TOLERANCE
# (query, key) pairs whose gradients are computed exactly; beyond that, some KV heads with all their queries and keys
MAX_PAIRS = {"cuda": 2**34, "cpu": 2**27}
CHUNK_BYTES = 2**28  # of one float64 block of scores, of which a dozen live at once
MASKED_ROWS = 1024  # query rows of a block at most where there is a mask: the fewer, the fewer keys that they do not see


def upstream(w: Workload, device: str, seed: int) -> Tensor:
    """dout [B, H, Sq, DV]: standard normal, the same for a seed on a type of device."""
    generator = torch.Generator(device).manual_seed(seed + 3)
    return torch.randn(w.shapes()["out"], generator=generator, device=device).to(w.dtype)


def masked(dout: Tensor, seed: int) -> Tensor:
    """dout with every third row, on average, zero: that of a token whose loss is masked."""
    generator = torch.Generator(dout.device).manual_seed(seed + 4)
    kept = torch.rand(dout.shape[:-1], generator=generator, device=dout.device) > 1 / 3
    return dout * kept[..., None]


def sample_kv_heads(w: Workload, device: str) -> list[int]:
    """The KV heads whose gradients are computed: all where they fit, else the first, the last and some between."""
    fit = max(1, MAX_PAIRS[device] // (w.batch * w.group * w.q_len * w.kv_len))
    if fit >= w.kv_heads:
        return list(range(w.kv_heads))
    return sorted({round(n * (w.kv_heads - 1) / max(1, fit - 1)) for n in range(fit)})


def query_heads(w: Workload, kv_heads: list[int]) -> list[int]:
    """The query heads that read some KV heads."""
    return [kv * w.group + member for kv in kv_heads for member in range(w.group)]


def reference(
    w: Workload, inputs: Inputs, dout: Tensor, kv_heads: list[int] | None = None, rounded: Tensor | None = None
) -> dict[str, Reference]:
    """The right dq, dk and dv, by "q", "k" and "v", each [B, heads, S, D], and the error each row may have.

    kv_heads: compute those of these KV heads, and of the queries that read them, alone. rounded: what plain arithmetic in the
    workload's dtype makes of dout, where dout is itself an exact result.
    """
    kv_heads = list(range(w.kv_heads)) if kv_heads is None else kv_heads
    exact, first_order = _exact(w, inputs, dout, kv_heads)
    plain = [_plain(w, inputs, dout if rounded is None else rounded, kv_heads, scaled) for scaled in PLAIN]
    found = {}
    for n, name in enumerate("qkv"):
        norm = exact[n].norm(dim=-1)
        # rows that hardly any query sees have gradients near zero: judge them against the size of the others
        size = float(norm.square().mean().sqrt())
        # where a query sees one key, dq and dk are 0, and what rounding may leave of them is all the size there is
        norm = norm.clamp(min=max(size, float(first_order[n].max())) or 1.0)
        # in float32 the lse's rounding is most of what may be wrong, and a query's: its row of dq and all of dk and dv share it
        queries = min(norm.numel(), w.batch * len(kv_heads) * w.group * w.q_len)
        shared = float((first_order[n] / norm).square().mean().sqrt()) if w.dtype == torch.float32 else 0.0
        in_common = 4 * shared / queries**0.5
        plainly = [one[n] for one in plain]
        found[name] = budgeted(w, exact[n], norm, first_order[n], plainly, None, BACKWARD_TOLERANCE, in_common)
    return found


class Block(NamedTuple):
    """Some query rows of one KV head and the keys that they see, all in one dtype: n = group, r = rows, s = keys."""

    where: tuple[int, int, slice]  # batch, position of the KV head, query rows
    keys: slice
    q: Tensor  # [n, r, D]
    k: Tensor  # [s, D]
    v: Tensor  # [s, DV]
    dout: Tensor  # [n, r, DV]
    scores: Tensor  # scaled and capped, [n, r, s]
    p: Tensor  # softmax weights
    slope: Tensor | None  # of the softcap at the scores


def _blocks(
    w: Workload, inputs: Inputs, dout: Tensor, kv_heads: list[int], dtype: torch.dtype, scaled: str = "scores"
) -> Iterator[Block]:
    """The forward pass in blocks. scaled: as for `oracle.attend`; "inputs" yields q and k already times the scale's root."""
    before, after = (1.0, w.scale) if scaled == "scores" else (w.scale**0.5, 1.0)
    length = max(1, CHUNK_BYTES // (w.group * w.kv_len * 8))
    length = min(length, MASKED_ROWS) if w.causal else length
    for b in range(w.batch):
        for n, kv in enumerate(kv_heads):
            heads = slice(kv * w.group, (kv + 1) * w.group)
            every_k, every_v = inputs.k[b, kv].to(dtype) * before, inputs.v[b, kv].to(dtype)
            for first in range(0, w.q_len, length):
                rows = slice(first, min(first + length, w.q_len))
                keys = w.keys_seen(rows)
                mask = w.mask(dout.device, torch.arange(rows.start, rows.stop))
                q, k, v = inputs.q[b, heads, rows].to(dtype) * before, every_k[keys], every_v[keys]
                scores, slope = q @ k.T * after, None
                if w.softcap:
                    bent = torch.tanh(scores / w.softcap)
                    scores, slope = bent * w.softcap, 1 - bent.square()
                p = torch.softmax(scores if mask is None else scores.masked_fill(~mask[:, keys], float("-inf")), -1)
                p = p.nan_to_num_(0.0) if w.blind_rows else p
                yield Block((b, n, rows), keys, q, k, v, dout[b, heads, rows].to(dtype), scores, p, slope)


def _room(w: Workload, inputs: Inputs, kv_heads: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for dq [B, KV, G, Sq, D], dk and dv [B, KV, Skv, D]."""
    device, lead = inputs.q.device, (w.batch, len(kv_heads))
    shapes = ((w.group, w.q_len, w.head_dim), (w.kv_len, w.head_dim), (w.kv_len, w.v_head_dim))
    dq, dk, dv = (torch.zeros(lead + shape, dtype=dtype, device=device) for shape in shapes)
    return dq, dk, dv


def _exact(w: Workload, inputs: Inputs, dout: Tensor, kv_heads: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The float64 gradients, and to first order the size of the error that the workload's dtype makes in each row.

    As for the forward pass, with unit roundoff u: a score is off by u·√score_error, a weight, a dp and a ds rounded once by u/√3
    of themselves; δ = Σ dout·out of the rounded output by u·‖dout∘out‖. Independent errors add in squares. What tensor cores
    lose of a float32 sum is in the scores alone: BACKWARD_TOLERANCE has room for the others.
    """
    u = torch.finfo(w.dtype).eps / 2
    summed = w.dtype == torch.float32  # products added up in the dtype itself
    sizes = float(inputs.v.double().square().mean() * dout.double().square().mean())  # dp is a sum of v_head_dim products
    in_dp, times = (2 * w.v_head_dim**2 * sizes, 2) if summed else (0.0, 1)  # a score is computed for the lse, and beside it
    dq, dk, dv = _room(w, inputs, kv_heads, torch.float64)
    squares = [torch.zeros_like(t[..., 0]) for t in (dq, dk, dv)]
    for x in _blocks(w, inputs, dout, kv_heads, torch.float64):
        (b, n, rows), keys = x.where, x.keys
        dp, products = x.dout @ x.v.T, x.dout * (x.p @ x.v)
        ds = x.p * (dp - products.sum(-1, keepdim=True))
        relative = times * score_error(w, x.scores) + 1 / 3
        delta = products.square().sum(-1, keepdim=True) + in_dp / 3  # [n, r, 1]; δ is a sum of v_head_dim products too
        if summed:  # the output that exp(score − lse) gave is off by the rounding of the lse, as in `oracle`
            delta += (products.sum(-1) * lse(x.scores, x.p)).square()[..., None] * (LSES / 3)
        in_ds = ds.square() * (relative + 1 / 3) + x.p.square() * ((dp.square() + in_dp) / 3 + delta)
        slope: Any = 1.0
        if x.slope is not None:  # 1 − tanh², of a tanh that was rounded: off by 2·tanh² of its two roundings, and rounded itself
            slope = x.slope
            in_ds = in_ds * slope.square() + ds.square() * (4 * (1 - slope).square() * (2 / 3) + slope.square() / 3)
        ds, in_ds = ds * slope * w.scale, in_ds * w.scale**2
        dq[b, n, :, rows] = ds @ x.k
        dk[b, n, keys] += ds.flatten(0, 1).T @ x.q.flatten(0, 1)
        dv[b, n, keys] += x.p.flatten(0, 1).T @ x.dout.flatten(0, 1)
        along_keys = (delta * ((x.p * slope * w.scale) @ x.k).square()).sum(-1)  # δ is one for the row: its errors do not cancel
        squares[0][b, n, :, rows] = in_ds @ x.k.square().sum(-1) + along_keys
        squares[1][b, n, keys] += x.q.square().sum(-1).flatten() @ in_ds.flatten(0, 1)
        squares[2][b, n, keys] += x.dout.square().sum(-1).flatten() @ (x.p.square() * relative).flatten(0, 1)
    return [dq.flatten(1, 2), dk, dv], [
        (square.flatten(1, 2) if n == 0 else square).sqrt() * u for n, square in enumerate(squares)
    ]


def _plain(w: Workload, inputs: Inputs, dout: Tensor, kv_heads: list[int], scaled: str) -> list[Tensor]:
    """The gradients written plainly in the workload's dtype, each step rounded.

    scaled "scores": as autograd does it, every query head's dk and dv rounded before they are added up. "inputs": as fused
    kernels do it, δ from the output and the scale last.
    """
    found = _room(w, inputs, kv_heads, torch.float32)  # matmuls add up in float32, so blocks do
    dq, dk, dv = found
    for x in _blocks(w, inputs, dout, kv_heads, w.dtype, scaled):
        (b, n, rows), keys = x.where, x.keys
        p, dp = x.p.float(), (x.dout @ x.v.T).float()
        fused = scaled == "inputs"
        delta = (x.dout.float() * (x.p @ x.v).float()) if fused else p * dp
        ds = (p * (dp - delta.sum(-1, keepdim=True))).to(w.dtype)
        ds = ds if x.slope is None else ds * x.slope
        ds, last = (ds, w.scale**0.5) if fused else (ds * w.scale, 1.0)
        dq[b, n, :, rows] = (ds @ x.k).float() * last
        dk_heads, dv_heads = (t.mT @ y for t, y in ((ds, x.q), (x.p, x.dout)))  # [n, s, D]
        dk[b, n, keys] += dk_heads.float().sum(0) * last
        dv[b, n, keys] += dv_heads.float().sum(0)
    return [dq.flatten(1, 2).to(w.dtype), dk.to(w.dtype), dv.to(w.dtype)]
