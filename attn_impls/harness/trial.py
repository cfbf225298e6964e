"""What a probe asks of a case on tensors of its own: the question with its right answers, kept, and the case's kernel on it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..registry import Unsupported, as_bhsd
from ..workload import Workload
from . import backward, gradients
from .case import Case, build, call, guard
from .inputs import Inputs, as_layout, plain
from .intact import Marks
from .oracle import attend

CONFUSED = 0.2  # of the largest value: what an approximate kernel's result may be off beside another


class Question:
    """Plain inputs and an upstream gradient, and what is right of them."""

    def __init__(self, workload: Workload, device: str):
        self.workload = workload
        self.x, self.dout = plain(workload, device, 0), gradients.upstream(workload, device, 0)

    @cached_property
    def output(self) -> Tensor:
        return attend(self.workload, self.x, None, torch.float64)

    @cached_property
    def gradients(self) -> list[Tensor]:
        return [one.out for one in gradients.reference(self.workload, self.x, self.dout).values()]


class Questions:
    """What was asked so far, kept: it is the same whoever is asked."""

    def __init__(self) -> None:
        self._asked: dict[tuple[Workload, str], Question] = {}
        self._marks = Marks()

    def of(self, workload: Workload, device: str) -> Question:
        if (workload, device) not in self._asked:
            self._asked[workload, device] = Question(workload, device)
        found = self._asked[workload, device]
        self._marks.add({f"{workload} {device} {name}": value for name, value in vars(found).items()})
        return found

    def mend(self) -> bool:
        """Whether somebody wrote on them, who should not have. Then all are made anew."""
        damaged = bool(self._marks.broken())
        if damaged:
            self._asked, self._marks = {}, Marks()
        return damaged


QUESTIONS = Questions()


class Trial:
    """A case with inputs and an upstream gradient of its own, its kernel, and what is right."""

    def __init__(self, case: Case):
        self.case, self.layout, self.question = case, case.implementation.layout, QUESTIONS.of(case.workload, case.device)
        self.native, self.native_dout = self.question.x.as_layout(self.layout), as_layout(self.question.dout, self.layout)
        self.kernel = build(case, self.native).kernel

    def output(self) -> str:
        """What is off of its output, "" if nothing."""
        out = call(self.case, self.kernel, self.native)
        unit = CONFUSED if self.case.implementation.approximate else None
        return what_is_off([self.question.output], [as_bhsd(out, self.layout)], ["its output"], unit)

    def gradients(self, dout: Tensor | None = None) -> Inputs | None:
        """dq, dk and dv, "bhsd"; None where it has none, or is approximate. dout: in its layout."""
        implementation = self.case.implementation
        with contextlib.suppress(Unsupported):
            if implementation.backward and not implementation.approximate:
                dout = self.native_dout if dout is None else dout
                return backward.gradients(self.case, self.kernel, self.native, dout, first=True)
        return None

    def some(self, wanted: str) -> str:
        """What is off where only some of q, k and v want a gradient, as behind frozen layers; "" if nothing."""
        leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip("qkv", self.native, strict=True)]
        with guard(self.case, "backward pass"):
            out = self.kernel(*leaves)
            if not out.requires_grad:
                return f"its output carries no gradient where only {' and '.join(wanted)} may have one"
            found = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], self.native_dout)
            if self.case.device == "cuda":
                torch.cuda.synchronize()
        right = [one for name, one in zip("qkv", self.question.gradients, strict=True) if name in wanted]
        off = what_is_off(right, [as_bhsd(one, self.layout) for one in found], [f"d{name}" for name in wanted])
        return off and f"{off} where only {' and '.join(wanted)} may have gradients"


def what_is_off(
    right: Sequence[Tensor],
    found: Sequence[Tensor],
    names: Sequence[str] = ("dq", "dk", "dv"),
    unit: float | None = None,
) -> str:
    """Which of some results is off and by how much, "" if none. unit: of its largest value, what it may be off."""
    for name, one, other in zip(names, right, found, strict=True):
        off = float((one - other).abs().max() / one.abs().max())
        if not off <= (unit or 8 * torch.finfo(other.dtype).eps):  # atomics need not repeat; NaN is wrong
            return f"{name} is off by {off:.0%} of its largest value"
    return ""
