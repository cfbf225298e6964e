"""The judge of gradients: float64 autograd of the unsharded attention, one KV head at a time, and what the dtype excuses."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Unsupported
from ..workload import Workload
from .inputs import Inputs
from .oracle import PLAIN, TOLERANCE, Reference, attend, only_heads

BACKWARD_TOLERANCE = 2 * TOLERANCE  # a backward pass recomputes the forward's products and multiplies again: five for two
MAX_HEAD_PAIRS = 2**30  # (query, key) pairs of one KV head, whose scores autograd keeps in float64


def upstream(w: Workload, device: str, seed: int) -> torch.Tensor:
    """dout [B, H, Sq, DV]: standard normal, the same for a seed on a type of device."""
    generator = torch.Generator(device).manual_seed(seed + 3)
    return torch.randn(w.shapes()["out"], generator=generator, device=device).to(w.dtype)


def reference(w: Workload, inputs: Inputs, dout: torch.Tensor, rounded: torch.Tensor | None = None) -> dict[str, Reference]:
    """The right dq, dk and dv, each [B, heads, S, D], with the error that autograd in the workload's dtype makes.

    rounded: what plain arithmetic makes of dout, where dout is itself an exact result.
    Raises Unsupported where the exact answer would not fit.
    """
    if w.blind_rows:
        raise Unsupported("gradients are not checked where rows see no key")
    if w.group * w.q_len * w.kv_len > MAX_HEAD_PAIRS:
        raise Unsupported(f"gradients are checked up to {MAX_HEAD_PAIRS} (query, key) pairs of a KV head")
    exact = _gradients(w, inputs, dout, torch.float64, "scores")
    plain = [_gradients(w, inputs, dout if rounded is None else rounded, w.dtype, scaled) for scaled in PLAIN]
    first_order = _first_order(w, inputs, dout)
    return {name: judged(w, exact[n], [one[n] for one in plain], first_order[n]) for n, name in enumerate("qkv")}


def _first_order(w: Workload, inputs: Inputs, dout: torch.Tensor) -> list[torch.Tensor]:
    """The size of the error that rounding in the workload's dtype makes in each row of dq, dk and dv, to first order.

    As for the forward pass, with unit roundoff u: a score rounded twice is off by u·|s|·√⅔, a weight, a dp and a ds rounded
    once by u/√3 of themselves; δ = Σ dout·out of the rounded output by u·‖dout∘out‖. Independent errors add in squares.
    """
    mask, u = w.mask(dout.device), torch.finfo(w.dtype).eps / 2
    found = [torch.empty(tensor.shape[:3], dtype=torch.float64, device=tensor.device) for tensor in inputs]
    for b in range(w.batch):
        for kv in range(w.kv_heads):
            heads = slice(kv * w.group, (kv + 1) * w.group)
            q, upstream = inputs.q[b, heads].double(), dout[b, heads].double()  # [G, Sq, D]
            k, v = inputs.k[b, kv].double(), inputs.v[b, kv].double()
            scores = q @ k.T * w.scale
            if w.softcap:
                scores = torch.tanh(scores / w.softcap) * w.softcap
            p = torch.softmax(scores if mask is None else scores.masked_fill(~mask, float("-inf")), -1)
            out, dp = p @ v, upstream @ v.T
            ds = p * (dp - (upstream * out).sum(-1, keepdim=True))
            relative = scores.square() * (2 / 3) + 1 / 3
            delta = (upstream * out).square().sum(-1, keepdim=True)  # [G, Sq, 1]
            in_ds = ds.square() * (relative + 1 / 3) + p.square() * (dp.square() / 3 + delta)
            along_keys = (delta * (p @ k).square()).sum(-1)  # δ is one for the row: its errors do not cancel
            squares = (in_ds @ k.square().sum(-1) + along_keys) * w.scale**2
            found[0][b, heads] = squares.sqrt() * u
            found[1][b, kv] = (in_ds * q.square().sum(-1, keepdim=True)).sum((0, 1)).sqrt() * u * w.scale
            found[2][b, kv] = (p.square() * relative * upstream.square().sum(-1, keepdim=True)).sum((0, 1)).sqrt() * u
    return found


def _gradients(w: Workload, inputs: Inputs, dout: torch.Tensor, dtype: torch.dtype, scaled: str) -> list[torch.Tensor]:
    one = w.replace(batch=1, heads=w.group, kv_heads=1)
    found = [torch.empty(tensor.shape, dtype=dtype, device=tensor.device) for tensor in inputs]
    for batch in range(w.batch):
        for kv in range(w.kv_heads):
            heads = slice(kv * w.group, (kv + 1) * w.group), slice(kv, kv + 1), slice(kv, kv + 1)
            where = [(slice(batch, batch + 1), part) for part in heads]
            leaves = Inputs(*(t[place].to(dtype).requires_grad_() for t, place in zip(inputs, where, strict=True)))
            out = attend(one, leaves, None, dtype, scaled)
            gradients = torch.autograd.grad(out, tuple(leaves), dout[where[0]].to(dtype))
            for into, place, gradient in zip(found, where, gradients, strict=True):
                into[place] = gradient
    return found


def judged(w: Workload, exact: torch.Tensor, plain: list[torch.Tensor], first_order: torch.Tensor) -> Reference:
    """The budget is BACKWARD_TOLERANCE times a row's plain errors, their RMS over rows, its first-order error, or one roundoff.

    The scale of a row is at least the rows' RMS: rows that hardly any query sees have gradients near zero.
    """
    norm = exact.norm(dim=-1)
    norm = norm.clamp(min=float(norm.square().mean().sqrt()))
    scale = torch.full_like(norm, torch.finfo(w.dtype).eps / 2)
    scale = torch.maximum(scale, first_order / norm)
    for one in plain:
        error = (one.double() - exact).norm(dim=-1) / norm
        scale = torch.maximum(scale, error.clamp(min=float(error.square().mean().sqrt())))
    return Reference(None, exact, norm, BACKWARD_TOLERANCE * scale)


def errors(plan: Any, known: dict[str, Reference], found: Inputs) -> dict[str, float]:
    """The worst row of each gradient of a rank's own heads, as a share of its budget; `plan` says which heads they are."""
    heads = {"q": plan.heads, "k": plan.kv_heads, "v": plan.kv_heads}
    errors = {}
    for name, gradient in zip("qkv", found, strict=True):
        real = [(position, head) for position, head in enumerate(heads[name]) if head >= 0]
        if real:
            mine = only_heads(known[name], [head for _, head in real])
            errors[name] = mine.over_budget(gradient[:, [position for position, _ in real]])
    return {name: errors.get(name, 0.0) for name in "qkv"}
