"""The right answers to the parts that ranks hold, from the unsharded ones: outputs, projections, and gradients of all."""

from __future__ import annotations

import dataclasses

import torch

from ..parallel.plan import Gradients, Holding, Plan
from ..registry import Unsupported, as_bhsd
from ..workload import Workload
from . import gradients
from .inputs import Inputs
from .oracle import PLAIN, TOLERANCE, Reference, attend, budgeted, only_heads


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


def unsharded_gradients(
    w: Workload, inputs: Inputs, dout: torch.Tensor, weight: torch.Tensor, kv_heads: list[int]
) -> dict[str, Reference]:
    """The right dq, dk and dv ("q", "k", "v") of some KV heads behind a projection, and dW ("weight") as [1, H, DV, E].

    dout [B, H, Sq, DV], its heads side by side, is the gradient of the projected output.
    """
    upstream = side_by_side(dout)  # [B, S, E]

    def into_heads(upstream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [B, H, S, DV]
        return (upstream @ weight.T).unflatten(2, (w.heads, -1)).transpose(1, 2)

    exact = into_heads(upstream.double(), weight.double())
    known = gradients.reference(w, inputs, exact, kv_heads, into_heads(upstream, weight))
    return known | {"weight": _weight_gradient(w, inputs, upstream)}


def _weight_gradient(w: Workload, inputs: Inputs, upstream: torch.Tensor) -> Reference:
    """dW = Σ out·upstream over all rows, with the error of doing it plainly and, to first order, that of rounding `out`."""

    def dw(out: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:  # [H·DV, B·S] × [B·S, E], as [1, H, DV, E]
        return (side_by_side(out).flatten(0, 1).T @ upstream.flatten(0, 1)).unflatten(0, (w.heads, -1))[None]

    out = attend(w, inputs, None, torch.float64)
    plain = [dw(attend(w, inputs, None, w.dtype, scaled), upstream) for scaled in PLAIN]
    squares = dw(out.square(), upstream.double().square().sum(-1, keepdim=True))[..., 0]
    exact = dw(out, upstream.double())
    return budgeted(w, exact, exact.norm(dim=-1), (squares / 3).sqrt() * torch.finfo(w.dtype).eps / 2, plain, None)


def gradient_errors(plan: Plan, known: dict[str, Reference], heads: dict[str, list[int]], found: Gradients) -> dict[str, float]:
    """The worst row of each gradient of a rank's own heads, as a share of its budget.

    heads: those that the answers to q, k and v are of. Raises Unsupported where this rank holds none of them.
    """
    mine = {"q": plan.heads, "k": plan.kv_heads, "v": plan.kv_heads, "weight": plan.heads}
    by_head = {name: as_bhsd(one, plan.spread.layout) for name, one in zip("qkv", found[:3], strict=True)}
    if found.weight is not None:
        by_head["weight"] = found.weight.unflatten(0, (len(plan.heads), -1))[None]
        heads = heads | {"weight": list(range(plan.spread.workload.heads))}
    errors = {}
    for name, gradient in by_head.items():
        pairs = [(position, heads[name].index(head)) for position, head in enumerate(mine[name]) if head in heads[name]]
        if not pairs and max(mine[name]) >= 0:
            raise Unsupported(f"its exact gradients fit for {len(heads['k'])} of the KV heads, and none of this rank's")
        right = only_heads(known[name], [place for _, place in pairs])
        errors[name] = right.over_budget(gradient[:, [position for position, _ in pairs]]) if pairs else 0.0
    return errors
