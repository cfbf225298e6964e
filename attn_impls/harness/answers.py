"""The right answers to the parts that ranks hold, from the unsharded ones: outputs, projections, and gradients of all."""

from __future__ import annotations

import dataclasses

import torch

from ..parallel.plan import Gradients, Holding, Plan
from ..workload import Workload
from . import gradients
from .inputs import Inputs
from .oracle import PLAIN, TOLERANCE, Reference, attend, only_heads


def held(w: Workload, reference: Reference, inputs: Inputs, holding: Holding, size: int) -> Reference:
    """What a rank must return that holds this part, from the unsharded answer to the unsharded inputs."""
    if holding.weight is None:
        return _only_rows(w, only_heads(reference, holding.heads), holding.rows)
    return _only_rows(w, projected(w, reference, inputs, holding.weight, size), holding.rows)


def _only_rows(w: Workload, reference: Reference, rows: range) -> Reference:
    """The answer for some query rows, counted from the first of them."""
    if len(rows) == w.q_len:
        return reference
    known = torch.arange(w.q_len, device=reference.out.device) if reference.rows is None else reference.rows
    mine = (known >= rows.start) & (known < rows.stop)
    parts = {name: getattr(reference, name)[:, :, mine] for name in ("out", "norm", "budget")}
    return dataclasses.replace(reference, rows=known[mine] - rows.start, **parts)


def projected(w: Workload, reference: Reference, inputs: Inputs, weight: torch.Tensor, size: int) -> Reference:
    """The oracle's answer behind the projection, [B, 1, R, E], with the error that doing it plainly in `size` parts makes.

    What attention itself may err passes W, whose entries have variance 1/E, with its size unchanged.
    """
    out = (side_by_side(reference.out) @ weight.double())[:, None]
    norm = out.norm(dim=-1)
    norm = torch.where(norm > 0, norm, norm.mean())
    before = (reference.budget / TOLERANCE * reference.norm).square().sum(1, keepdim=True).sqrt()
    scale = (before / norm).clamp(min=torch.finfo(w.dtype).eps / 2)
    heads = torch.arange(w.heads * w.v_head_dim, device=weight.device).chunk(size)
    for scaled in PLAIN:
        plain = side_by_side(attend(w, inputs, reference.rows, w.dtype, scaled))
        parts = [plain[..., columns] @ weight[columns] for columns in heads]
        total = parts[0]
        for part in parts[1:]:
            total = total + part  # each partial product and each sum rounded, as between ranks
        error = (total[:, None].double() - out).norm(dim=-1) / norm
        scale = torch.maximum(scale, error.clamp(min=float(error.square().mean().sqrt())))
    return dataclasses.replace(reference, out=out, norm=norm, budget=TOLERANCE * scale, drift=float("inf"))


def side_by_side(out: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as [B, S, H·D]."""
    return out.transpose(1, 2).flatten(2)


def unsharded_gradients(w: Workload, inputs: Inputs, dout: torch.Tensor, weight: torch.Tensor | None) -> dict[str, Reference]:
    """The right dq, dk and dv ("q", "k", "v"); behind a projection also dW ("weight") as [1, H, DV, E].

    dout is then the gradient of the projected output. Raises Unsupported where the exact answer would not fit.
    """
    if weight is None:
        return gradients.reference(w, inputs, dout)
    upstream = side_by_side(dout)  # [B, S, E]

    def into_heads(upstream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [B, H, S, DV]
        return (upstream @ weight.T).unflatten(2, (w.heads, -1)).transpose(1, 2)

    exact = into_heads(upstream.double(), weight.double())
    return gradients.reference(w, inputs, exact, into_heads(upstream, weight)) | {"weight": _weight_gradient(w, inputs, upstream)}


def _weight_gradient(w: Workload, inputs: Inputs, upstream: torch.Tensor) -> Reference:
    """dW = Σ out·upstream over all rows, with the error of doing it plainly and, to first order, that of rounding `out`."""

    def dw(out: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:  # [H·DV, B·S] × [B·S, E], as [1, H, DV, E]
        return (side_by_side(out).flatten(0, 1).T @ upstream.flatten(0, 1)).unflatten(0, (w.heads, -1))[None]

    out = attend(w, inputs, None, torch.float64)
    plain = [dw(attend(w, inputs, None, w.dtype, scaled), upstream) for scaled in PLAIN]
    squares = dw(out.square(), upstream.double().square().sum(-1, keepdim=True))[..., 0]
    first_order = (squares / 3).sqrt() * torch.finfo(w.dtype).eps / 2
    return gradients.judged(w, dw(out, upstream.double()), plain, first_order)


def gradient_errors(plan: Plan, known: dict[str, Reference], found: Gradients) -> dict[str, float]:
    """The worst row of each gradient of a rank's own heads, as a share of its budget."""
    bhsd = plan.spread.layout == "bhsd"
    errors = gradients.errors(plan, known, Inputs(*(t if bhsd else t.transpose(1, 2) for t in found[:3])))
    if found.weight is None:
        return errors
    real = [(position, head) for position, head in enumerate(plan.heads) if head >= 0]
    if not real:
        return errors | {"weight": 0.0}
    by_head = found.weight.unflatten(0, (len(plan.heads), -1))[None, [position for position, _ in real]]
    return errors | {"weight": only_heads(known["weight"], [head for _, head in real]).over_budget(by_head)}
