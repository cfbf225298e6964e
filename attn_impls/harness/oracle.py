"""The judge of outputs: attention in float64, and how much error the workload's own dtype excuses, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..workload import Workload
from .inputs import Inputs

# (query, key) pairs computed exactly, over batch and heads; beyond that, sampled query rows
MAX_PAIRS = {"cuda": 2**32, "cpu": 2**25}
CHUNK_BYTES = 2**30
# A row may err by this multiple of its honest error: the largest of the plain runs' errors in it, their RMS over all
# rows, the first-order rounding error, and one unit roundoff.
TOLERANCE = 2.0
LSES = 8  # roundings of a row's lse: a ring over eight parts has as many
PLAIN = ("scores", "inputs")  # the plain ways: scale the scores, or scale q and k by its root as SDPA's math path does


@dataclass
class Reference:
    """The right answer for one set of inputs, on all query rows or on a sample of them.

    out [B, H, R, DV] float64; norm and budget [B, H, R]: a row's size, and the relative error it may have. drift: how much
    too large or too small all rows may be together, relative: what no single row can show.
    """

    rows: torch.Tensor | None
    out: torch.Tensor
    norm: torch.Tensor
    budget: torch.Tensor
    drift: float = float("inf")  # not judged

    def select(self, out: torch.Tensor) -> torch.Tensor:
        """The rows of an output [B, H, Sq, DV] that this reference knows, in float64."""
        return (out if self.rows is None else out[:, :, self.rows]).double()

    def error(self, out: torch.Tensor) -> torch.Tensor:
        """Relative error of each row, [B, H, R]: ‖out − reference‖ / ‖reference‖."""
        return (self.select(out) - self.out).norm(dim=-1) / self.norm

    def over_budget(self, out: torch.Tensor) -> float:
        """The worst row's error as a multiple of its budget: 1 or less passes. NaN and infinity give infinity."""
        return _worst(self.error(out) / self.budget)

    def rms_over_budget(self, out: torch.Tensor) -> float:
        return float((self.error(out) / self.budget).square().mean().sqrt())

    def drift_over_budget(self, out: torch.Tensor) -> float:
        """The mean over rows of (out − reference)·reference / ‖reference‖², as a multiple of what it may be."""
        return _worst(stretches(self.select(out), self.out, self.norm).mean().abs() / self.drift)

    def apart(self, one: torch.Tensor, other: torch.Tensor, others: Reference) -> float:
        """The worst row's distance between two outputs, as a multiple of the sum of their budgets; the other's is `others`'."""
        distance = (self.select(one) - self.select(other)).norm(dim=-1) / self.norm
        return _worst(distance / (self.budget + others.budget))


def reference(w: Workload, inputs: Inputs, seed: int = 0, prefer: torch.Tensor | None = None) -> Reference:
    """Compute the oracle and the budget for some inputs, on the inputs' device.

    prefer: query rows that a sample should contain, the most important first.
    """
    rows = sample_rows(w, inputs.q.device.type, seed, prefer)
    out, rounding = _exact(w, inputs, rows)
    norm = out.norm(dim=-1)
    # a row that sees no key has the answer 0: judge it against the size of the others
    norm = torch.where(norm > 0, norm, norm[norm > 0].mean() if bool((norm > 0).any()) else torch.ones_like(norm))
    plain = [attend(w, inputs, rows, w.dtype, scaled) for scaled in PLAIN]
    return budgeted(w, out, norm, rounding, plain, rows)


def budgeted(
    w: Workload,
    out: torch.Tensor,
    norm: torch.Tensor,
    rounding: torch.Tensor,
    plain: list[torch.Tensor],
    rows: torch.Tensor | None,
    tolerance: float = TOLERANCE,
    in_common: float = 0.0,
) -> Reference:
    """The right answer with its budget, `tolerance` times the honest error.

    Which is known from the first-order rounding error of each row and from some plain runs in the dtype. in_common: what rows
    may all be off together, relative, because they share what is rounded.
    """
    scale, unit = rounding / norm, torch.finfo(w.dtype).eps / 2
    noise, drift = unit / 4, max(unit / 4, 2**-12)
    for run in plain:
        run = run.double()
        error = (run - out).norm(dim=-1) / norm
        scale = torch.maximum(scale, error.clamp(min=float(error.square().mean().sqrt())))
        stretch = stretches(run, out, norm)
        noise = max(noise, float(stretch.square().mean().sqrt()))
        drift = max(drift, TOLERANCE * abs(float(stretch.mean())))
    # rounding errors of N rows are independent, so their mean shrinks with √N; what is systematic may stay this small
    drift += 4 * noise / norm.numel() ** 0.5 + in_common
    return Reference(rows, out, norm, tolerance * scale.clamp(min=unit), drift)


def only_heads(reference: Reference, heads: list[int]) -> Reference:
    """The answer for some heads."""
    parts = {name: getattr(reference, name)[:, heads] for name in ("out", "norm", "budget")}
    return dataclasses.replace(reference, **parts)


def stretches(out: torch.Tensor, right: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """By how much each row is longer than it should be, relative, [B, H, R]."""
    return ((out - right) * right).sum(-1) / norm**2


def score_error(w: Workload, scores: torch.Tensor) -> torch.Tensor:
    """The mean square of what rounding does to scores, in squared unit roundoffs of the workload's dtype.

    Two roundings (product and scale), three more with a softcap. In float32 the products are added up in the dtype itself:
    partial sums of D products wander by √D, and march to the score where q points at k. Tensor cores lose what is `truncated`.
    """
    roundings = 5 if w.softcap else 2
    if w.dtype != torch.float32:
        return scores.square() * (roundings / 3)
    return scores.square() * (roundings / 3 + w.head_dim / 9 + truncated(w.head_dim) ** 2) + 2 * w.head_dim


def truncated(products: int) -> float:
    """What tensor cores lose of a float32 sum of products, in unit roundoffs of it: toward zero, so it does not average out.

    Three products of TF32 parts stand for one (Ootomo & Yokota, arXiv 2203.03341); the fourth, dropped, is 2 where the parts are
    truncated. Each step of eight products truncates again, some 2 more, until CUTLASS takes the sum out after 32 to round it.
    """
    return 2 + min(products, 32) / 4


def attend(w: Workload, inputs: Inputs, rows: torch.Tensor | None, dtype: torch.dtype, scaled: str = "scores") -> torch.Tensor:
    """Attention written plainly in a dtype, for all query rows or some, [B, H, R, DV]. Rows that see no key are 0."""
    out = empty(w, inputs, rows, dtype)
    for where, _, weights, v in chunks(w, inputs, rows, dtype, scaled):
        out[where] = of_group(weights, v)
    return out.reshape(w.batch, w.heads, -1, w.v_head_dim)


def empty(w: Workload, inputs: Inputs, rows: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Room for an output, [B·KV, G, R, DV]."""
    length = w.q_len if rows is None else len(rows)
    return torch.empty(w.batch * w.kv_heads, w.group, length, w.v_head_dim, dtype=dtype, device=inputs.q.device)


def _exact(w: Workload, inputs: Inputs, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 answer, and to first order the size of the error that rounding in the workload's dtype makes in each row.

    With unit roundoff u, a score is off by u·√score_error and a weight p rounded once by u·p/√3 (root mean square); each moves
    the output by p·(v − out). Independent errors add in squares. A plain run of the same row may be lucky; this cannot.
    In float32 the sum of p·v, too, loses what is `truncated`, and a kernel may take exp(score − lse) for the weights or merge
    splits or the parts of a ring so: the row has the errors of LSES roundings of its lse.
    """
    summed = w.dtype == torch.float32
    outs = empty(w, inputs, rows, torch.float64)
    roundings = torch.empty_like(outs[..., 0])
    for where, scores, weights, v in chunks(w, inputs, rows, torch.float64, "scores"):
        out = of_group(weights, v)
        spread = weights.square() * (score_error(w, scores) + 1 / 3)
        squares = moved(spread, v, out)
        if summed:
            squares += out.square().sum(-1) * (truncated(w.kv_len) ** 2 + lse(scores, weights).square() * (LSES / 3))
        outs[where] = out
        roundings[where] = squares.clamp(min=0).sqrt() * (torch.finfo(w.dtype).eps / 2)
    shape = (w.batch, w.heads, -1)
    return outs.reshape(*shape, w.v_head_dim), roundings.reshape(shape)


def lse(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log Σ exp(score) of rows [.., Skv], by their largest weight; 0 for a row that sees no key."""
    largest, where = weights.max(-1, keepdim=True)
    return torch.where(largest > 0, scores.gather(-1, where) - largest.log(), 0.0)[..., 0]


def moved(spread: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Σ over keys of spread·‖v − out‖², [n, G, R], for spread [n, G, R, Skv], v [n, 1, Skv, DV] and out [n, G, R, DV]."""
    basis = torch.cat([v, v.square().sum(-1, keepdim=True), torch.ones_like(v[..., :1])], -1).float()
    sums = of_group(spread.float(), basis).double()  # of v, of |v|² and of 1, weighted
    return sums[..., -2] - 2 * (sums[..., :-2] * out).sum(-1) + sums[..., -1] * out.square().sum(-1)


def of_group(heads: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """heads [n, G, r, K] @ shared [n, 1, K, D], without the copy of `shared` for each of the G heads that `@` makes."""
    return (heads.flatten(1, 2) @ shared[:, 0]).unflatten(1, heads.shape[1:3])


def chunks(
    w: Workload, inputs: Inputs, rows: torch.Tensor | None, dtype: torch.dtype, scaled: str
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For some KV heads and query rows at a time: where they go in [B·KV, G, R], their scores before masking and their
    softmax weights [n, G, r, Skv], and v [n, 1, Skv, DV]."""
    q = inputs.q if rows is None else inputs.q[:, :, rows]
    length = q.shape[2]
    q = q.reshape(w.batch * w.kv_heads, w.group, length, w.head_dim)
    k, v = (t.flatten(0, 1)[:, None] for t in (inputs.k, inputs.v))  # [B·KV, 1, Skv, D]
    rows = torch.arange(length, device=q.device) if rows is None else rows
    before, after = (1.0, w.scale) if scaled == "scores" else (w.scale**0.5, 1.0)
    fit = CHUNK_BYTES // (w.group * w.kv_len * 8)  # query rows of one KV head
    for first in range(0, length, max(1, min(fit, length))):
        part = slice(first, first + max(1, min(fit, length)))
        mask = w.mask(q.device, rows[part])
        for head in range(0, len(q), max(1, fit // length)):
            chunk = slice(head, head + max(1, fit // length))
            scores = of_group(q[chunk, :, part].to(dtype) * before, (k[chunk].to(dtype) * before).mT) * after
            if w.softcap:
                scores = torch.tanh(scores / w.softcap) * w.softcap
            weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask, float("-inf")), -1)
            where = (chunk, slice(None), part)
            yield where, scores, weights.nan_to_num_(0.0) if w.blind_rows else weights, v[chunk].to(dtype)


def sample_rows(w: Workload, device: str, seed: int, prefer: torch.Tensor | None = None) -> torch.Tensor | None:
    """None where every row fits; else first and last rows, both sides of tile edges, preferred and random ones, sorted."""
    fit = MAX_PAIRS[device] // (w.batch * w.heads * w.kv_len)
    if w.q_len <= max(fit, 128):
        return None
    fit = max(fit, 128)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(64, w.q_len, 64)
    edges = edges[torch.randperm(len(edges), generator=generator)[: fit // 4]]
    ends = torch.tensor([0, 1, w.q_len - 2, w.q_len - 1])
    free = fit - 2 * len(edges) - len(ends)
    preferred = torch.empty(0, dtype=torch.long) if prefer is None else prefer[: free * 3 // 4]
    random = torch.randperm(w.q_len, generator=generator)[: free - len(preferred)]
    return torch.cat([ends, edges - 1, edges, preferred, random]).unique().to(device)


def _worst(ratio: torch.Tensor) -> float:
    return float(ratio.max()) if bool(ratio.isfinite().all()) else float("inf")
