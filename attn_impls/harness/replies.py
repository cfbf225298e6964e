"""Replies to probes: what a kernel makes of inputs whose answer is known, and what it makes of company."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..registry import Unsupported, as_bhsd
from ..workload import Workload
from . import backward
from .case import Case, build, call
from .inputs import Inputs, transposed_in_memory
from .trial import Trial, what_is_off

APPROXIMATE = 0.05
PAIRS_COMPILED = 5  # pairs that are asked of what compiles
PAIRS_TRAINED = 10  # pairs whose gradients are asked of all else


@dataclass(frozen=True)
class Closed:
    """The reply to inputs whose exact output is known. ask: q, k, v and out, bhsd, float64."""

    ask: Callable[[Workload], tuple[Tensor, Tensor, Tensor, Tensor]]

    def __call__(self, case: Case) -> str:
        w, layout = case.workload, case.implementation.layout
        q, k, v, right = self.ask(w)
        inputs = Inputs(*(t.to(w.dtype).to(case.device) for t in (q, k, v))).as_layout(layout)
        kernel = build(case, inputs).kernel
        out = call(case, kernel, inputs)
        out = as_bhsd(out, layout).double().cpu()
        unit = APPROXIMATE if case.implementation.approximate else 2 * torch.finfo(w.dtype).eps
        wrong = ~((out - right).abs() <= unit * (right.abs() + 0.1))  # NaN is wrong
        if not bool(wrong.any()):
            return "ok"
        first = tuple(wrong.nonzero()[0].tolist())
        return f"wrong: {int(wrong.sum())} of {wrong.numel()} values, at {list(first)} {out[first]:.4g} for {right[first]:.4g}"


def of_training(workloads: Sequence[Workload]) -> Callable[[Case], str]:
    """The reply to a backward pass on each of some workloads, also where some inputs want no gradient.

    The latter on the first alone of what compiles, which may do so anew for each.
    """

    def reply(case: Case) -> str:
        asked, reason = 0, "forward only, or approximate"
        for w in workloads:
            try:
                trial = Trial(replace(case, workload=w))
            except Unsupported:
                continue
            if trial.output():  # which another probe tells
                reason = "wrong outputs"
                continue
            found = trial.gradients()
            if found is None:
                continue
            if off := what_is_off(trial.question.gradients, found):
                return f"wrong: {off} with {w}"
            if not (asked and case.implementation.compiles) and (off := _of_some(trial)):
                return f"wrong: {off} with {w}"
            asked += 1
        if not asked:
            raise Unsupported(reason)
        return "ok"

    return reply


def _of_some(trial: Trial) -> str:
    for wanted in ("q", "k", "v", "qk", "qv", "kv"):
        if off := trial.some(wanted):
            return off
    found = trial.gradients(torch.zeros_like(trial.native_dout))
    if found is None:
        return "it has no gradients where dout is 0"
    return "its gradients are not 0 where dout is" if any(bool((one != 0).any()) for one in found) else ""  # NaN is not 0


def of_a_view(workloads: Sequence[Workload]) -> Callable[[Case], str]:
    """The reply to douts that lie in memory otherwise than a kernel's output, on each of some workloads.

    What compiles is asked of the first alone.
    """

    def reply(case: Case) -> str:
        asked, reason = False, ""
        for w in workloads[: 1 if case.implementation.compiles else None]:
            try:
                said = _of_views(Trial(replace(case, workload=w)))
            except Unsupported as unsupported:
                reason = reason or str(unsupported)
                continue
            asked = True
            if said:
                return f"wrong: {said} with {w}"
        if not asked:
            raise Unsupported(reason)
        return "ok"

    return reply


def _of_views(trial: Trial) -> str:
    """What is off where dout is expanded, as behind a sum, a part of something wider or longer, as where tokens or heads were
    joined, and as the other layout has it, as behind an output projection; "" if nothing.

    Each asked after a contiguous one: a library may have kept what it found out about the memory of the first.
    """
    dout = trial.native_dout
    views = {
        "is one value, expanded": torch.ones_like(dout[:1, :1, :1, :1]).expand_as(dout),
        "is a part of a wider tensor": _part(dout, 3),
        "is a view of another layout": transposed_in_memory(dout),
        "is a part of what has more tokens": _part(dout, trial.layout.index("s")),
        "is a part of what has more heads": _part(dout, trial.layout.index("h")),
    }
    for what, view in views.items():
        right = trial.gradients(view.clone(memory_format=torch.contiguous_format))
        if right is None:
            raise Unsupported("forward only, or approximate")
        found = trial.gradients(view)
        off = "it has no gradients" if found is None else what_is_off(right, found)
        if off:
            return f"{off} where dout {what}"
    return ""


def _part(tensor: Tensor, dim: int) -> Tensor:
    """The same values, as the second half of something twice as large in one dimension."""
    return torch.cat([2 * tensor, tensor], dim).narrow(dim, tensor.shape[dim], tensor.shape[dim])


def beside_another(pairs: Sequence[tuple[Workload, Workload]]) -> Callable[[Case], str]:
    """The reply to two kernels at once: each must keep the sizes and options that it was built with.

    A cache keyed by only some sizes and options gives one kernel the other's. Gradients are asked of the first PAIRS_TRAINED
    pairs. What compiles does so anew for each, and is asked PAIRS_COMPILED.
    """

    def reply(case: Case) -> str:
        asked = False
        for n, (one, other) in enumerate(pairs[: PAIRS_COMPILED if case.implementation.compiles else None]):
            try:
                complaint = _confused(replace(case, workload=one), replace(case, workload=other), gradients=n < PAIRS_TRAINED)
            except Unsupported:
                continue
            asked = True
            if complaint:
                return f"wrong: {complaint}"
        if not asked:
            raise Unsupported("none of the options")
        return "ok"

    return reply


def _confused(one: Case, other: Case, gradients: bool) -> str:
    """What is wrong of two cases, each alone and beside the other, "" if nothing. Raises Unsupported for either."""
    first = Trial(one)
    if off := first.output():
        return f"{off} with {one.workload}"
    trained = first.gradients() if gradients else None
    second = Trial(other)
    both = (first, second)
    # an option shows in one order; of sizes and dtypes, the larger one built last may do for both
    ordered = (one.workload.shapes(), one.workload.dtype) != (other.workload.shapes(), other.workload.dtype)
    for again in (False, True) if ordered else (False,):
        if again:
            Trial(one)  # so that now the first one has been built last
        for this, company in ((second, first), (first, second)):
            if off := this.output():
                return f"{off} with {this.case.workload} beside {company.case.workload}"
    if trained is None or second.gradients() is None:
        return ""
    last = (second, first)
    found = backward.beside(
        [trial.case for trial in last],
        [trial.kernel for trial in last],
        [trial.native for trial in last],
        [trial.native_dout for trial in last],
    )
    for this, company, gradient in zip(last, both, found, strict=True):
        if off := what_is_off(this.question.gradients, gradient):
            return f"{off} with {this.case.workload} where {company.case.workload} ran before its backward pass"
    return ""


def averages(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero queries see all visible keys alike; v is 1, 2, 3, … along the keys, so a row is the mean of what it sees."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    v += torch.arange(1.0, w.kv_len + 1)[:, None]
    rows = []
    for i in range(w.q_len):
        last = i + w.offset
        first = max(0, last - w.window + 1) if w.window else 0
        rows.append((first + last) / 2 + 1 if last >= 0 else 0.0)
    return q, k, v, torch.tensor(rows)[:, None].expand(w.shapes()["out"]).double()


def heads(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v is the number of its KV head, from 1, and 10 more for each batch."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    batch = 10.0 * torch.arange(w.batch)[:, None, None, None]
    v += batch + torch.arange(1.0, w.kv_heads + 1)[:, None, None]
    out = batch + torch.arange(1.0, w.kv_heads + 1).repeat_interleave(w.group)[:, None, None]
    return q, k, v, out.expand(w.shapes()["out"]).double()


def one_score(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One key has the product 24 with every query, the others 0; only its v is not 0 but 1: its weight is the answer."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    q[..., 0], k[:, :, 3, 0], v[:, :, 3] = 4.0, 6.0, 1.0
    score = 24.0 / math.sqrt(w.scale_dim)
    score = w.softcap * math.tanh(score / w.softcap) if w.softcap else score
    weight = math.exp(score) / (math.exp(score) + w.kv_len - 1)
    return q, k, v, torch.full(w.shapes()["out"], weight, dtype=torch.float64)


def copies(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query i picks key 5·i mod n; v tells batch, head, key and column apart."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    picked = torch.arange(w.q_len) * 5 % w.kv_len
    k[:, :, torch.arange(w.kv_len), torch.arange(w.kv_len)] = 20.0
    q[:, :, torch.arange(w.q_len), picked] = 20.0
    number = torch.arange(float(w.batch * w.heads * w.kv_len)).reshape(w.batch, w.heads, w.kv_len, 1)
    v += number + 64 * (torch.arange(w.v_head_dim) % 3)
    return q, k, v, v[:, :, picked].clone()
