"""The judge of gradients: float64 autograd of the unsharded attention, one KV head at a time, and what the dtype excuses."""

from __future__ import annotations

import torch

from ..registry import Unsupported
from ..workload import Workload
from .inputs import Inputs
from .oracle import PLAIN, TOLERANCE, Reference, attend

MAX_HEAD_PAIRS = 2**30  # (query, key) pairs of one KV head, whose scores autograd keeps in float64


def upstream(w: Workload, device: str, seed: int) -> torch.Tensor:
    """dout [B, H, Sq, DV]: standard normal, the same for a seed on a type of device."""
    generator = torch.Generator(device).manual_seed(seed + 3)
    return torch.randn(w.shapes()["out"], generator=generator, device=device).to(w.dtype)


def reference(w: Workload, inputs: Inputs, dout: torch.Tensor) -> dict[str, Reference]:
    """The right dq, dk and dv, each [B, heads, S, D], with the error that autograd in the workload's dtype makes.

    Raises Unsupported where the exact answer would not fit.
    """
    if w.blind_rows:
        raise Unsupported("gradients are not checked where rows see no key")
    if w.group * w.q_len * w.kv_len > MAX_HEAD_PAIRS:
        raise Unsupported(f"gradients are checked up to {MAX_HEAD_PAIRS} (query, key) pairs of a KV head")
    exact = _gradients(w, inputs, dout, torch.float64, "scores")
    plain = [_gradients(w, inputs, dout, w.dtype, scaled) for scaled in PLAIN]
    return {name: _judged(w, exact[n], [one[n] for one in plain]) for n, name in enumerate("qkv")}


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


def _judged(w: Workload, exact: torch.Tensor, plain: list[torch.Tensor]) -> Reference:
    """A row may err by the plain runs' error in it, their RMS over rows, or one unit roundoff of a typical row, times TOLERANCE.

    The scale of a row is at least the rows' RMS: rows that hardly any query sees have gradients near zero.
    """
    norm = exact.norm(dim=-1)
    norm = norm.clamp(min=float(norm.square().mean().sqrt()))
    scale = torch.full_like(norm, torch.finfo(w.dtype).eps / 2)
    for one in plain:
        error = (one.double() - exact).norm(dim=-1) / norm
        scale = torch.maximum(scale, error.clamp(min=float(error.square().mean().sqrt())))
    return Reference(None, exact, norm, TOLERANCE * scale)
