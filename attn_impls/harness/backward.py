"""The backward pass of a kernel, as something to call: its gradients alone, or behind a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..registry import Kernel, Unsupported, as_bhsd, one_line
from .case import Case, CaseFailed, OutOfMemory, evaluating, guard, release, validate
from .inputs import Inputs

# how a library says that it has a forward pass only
FORWARD_ONLY = (
    "does not support backward",
    "derivative for",
    "no backward",
    "backward is not supported",
    "Backward not implemented",
)


class Backward:
    """dq, dk and dv of a kernel, in its layout. Each call uses up a forward pass that `ready` has made."""

    def __init__(self, kernel: Kernel, inputs: Inputs, dout: torch.Tensor):
        """inputs, dout: in the kernel's layout."""
        self.kernel, self.dout = kernel, dout
        self.leaves = Inputs(*(tensor.detach().requires_grad_() for tensor in inputs))
        self.outs: list[torch.Tensor] = []

    def ready(self, calls: int) -> None:
        """Run as many forward passes; those left over from a round that is measured again go first."""
        self.outs.clear()
        self.outs.extend(self.kernel(*self.leaves) for _ in range(calls))

    def __call__(self) -> Inputs:
        return Inputs(*torch.autograd.grad(self.outs.pop(), self.leaves, self.dout))


class ForwardBackward(Backward):
    """The same with its forward pass in the call."""

    def ready(self, calls: int) -> None:
        pass

    def __call__(self) -> Inputs:
        return Inputs(*torch.autograd.grad(self.kernel(*self.leaves), self.leaves, self.dout))


CALLS: dict[str, Callable[[Kernel, Inputs, torch.Tensor], Any]] = {"backward": Backward, "forward+backward": ForwardBackward}


def forward_only(error: Exception) -> str:
    """Why an error means that there is no backward pass, or ""."""
    if "Could not run '" in str(error):  # an operator that the build lacks, as torch words it: broken, not limited
        return ""
    said = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in FORWARD_ONLY)]
    if said:
        return f"forward only: {said[0]}"
    if not isinstance(error, NotImplementedError):
        return ""
    _, because, rest = str(error).partition("not supported because")  # as xFormers lists reasons, after the inputs
    listed = [line.strip() for line in rest.splitlines() if line.startswith("    ")] if because else []
    return f"no backward here: {'; '.join(dict.fromkeys(listed)) or one_line(error)}"


class Pass(NamedTuple):
    """What a kernel gives in training, "bhsd": copies of its output and its gradients."""

    out: torch.Tensor
    gradients: Inputs
    complaint: str = ""  # what disqualifies it before any comparison


def passes(
    case: Case,
    kernel: Kernel,
    inputs: Sequence[Inputs],
    douts: Sequence[torch.Tensor],
    first: bool = False,
    in_order: bool = False,
) -> list[Pass]:
    """Forward passes on tensors in the kernel's layout, one after another as layers make them, then, in reverse, backward passes.

    Each for itself where they do not fit together. first: raises Unsupported where the kernel says, or shows, that it is
    forward only. in_order: the backward passes too, as pipelines make them. CaseFailed where it fails otherwise.
    """
    try:
        return _together([case] * len(inputs), _calls(kernel, inputs, douts), first, in_order)
    except OutOfMemory as error:
        if len(inputs) == 1:
            raise
        failure = OutOfMemory(str(error))  # without the frames, which hold what the first attempt took
    release(case.device, failure)
    return [one for x, dout in zip(inputs, douts, strict=True) for one in _together([case], _calls(kernel, [x], [dout]), first)]


def gradients(case: Case, kernel: Kernel, inputs: Inputs, dout: torch.Tensor, first: bool = False) -> Inputs:
    """dq, dk and dv, "bhsd", after one synchronised forward and backward pass; raises as `passes` does."""
    return passes(case, kernel, [inputs], [dout], first)[0].gradients


def beside(
    cases: Sequence[Case], kernels: Sequence[Kernel], inputs: Sequence[Inputs], douts: Sequence[torch.Tensor]
) -> list[Inputs]:
    """The gradients of each of some cases of one implementation, whose forward passes all came before."""
    calls = [Backward(*one) for one in zip(kernels, inputs, douts, strict=True)]
    return [one.gradients for one in _together(cases, calls, first=False)]


def _calls(kernel: Kernel, inputs: Sequence[Inputs], douts: Sequence[torch.Tensor]) -> list[Backward]:
    return [Backward(kernel, x, dout) for x, dout in zip(inputs, douts, strict=True)]


def _without_gradients(case: Case, call: Backward) -> None:
    """A call as an evaluation between the passes makes it, of which no backward pass may take anything."""
    with evaluating(case):
        call.kernel(*(leaf.detach() for leaf in call.leaves))


def _together(cases: Sequence[Case], calls: Sequence[Backward], first: bool, in_order: bool = False) -> list[Pass]:
    case = cases[0]
    found: dict[int, Pass] = {}
    given: dict[int, Inputs] = {}  # the gradients themselves, which whoever takes them may keep
    with guard(case, "backward pass", allowed=first):
        try:
            for of, call in zip(cases, calls, strict=True):
                call.ready(1)
                if not call.outs[0].requires_grad:
                    raise Unsupported("forward only: its output carries no gradient")
                validate(of, call.outs[0])
            outs = [call.outs[0] for call in calls]
            before = [out.detach().clone() for out in outs]
            if len(calls) > 1 and len(set(cases)) == 1:
                for call in (calls[-1], calls[0]):  # of other inputs than what came before it, and than what comes next
                    _without_gradients(case, call)
            for n in range(len(calls)) if in_order else reversed(range(len(calls))):
                given[n] = calls[n]()
                complaint = "" if torch.equal(outs[n].detach(), before[n]) else "changed its output in the backward pass"
                found[n] = Pass(before[n], Inputs(*(gradient.clone() for gradient in given[n])), complaint)
            for n, gradients in given.items() if len(given) > 1 else ():
                if not all(map(_unchanged, gradients, found[n].gradients)):
                    found[n] = found[n]._replace(complaint="overwrote the gradients of one backward pass in another")
        except Unsupported:
            raise
        except Exception as error:
            if reason := forward_only(error):
                raise Unsupported(reason) from None
            raise
        if case.device == "cuda":
            torch.cuda.synchronize()
    return [_validated(of, found[n], call.leaves) for n, (of, call) in enumerate(zip(cases, calls, strict=True))]


def _unchanged(one: torch.Tensor, copy: torch.Tensor) -> bool:
    return torch.equal(one, copy) or torch.equal(one.nan_to_num(), copy.nan_to_num())


def _validated(case: Case, found: Pass, inputs: Inputs) -> Pass:
    for name, gradient, tensor in zip("qkv", found.gradients, inputs, strict=True):
        if gradient.shape != tensor.shape or gradient.dtype != tensor.dtype:
            raise CaseFailed(
                f"{case.implementation.name} returned d{name} {tuple(gradient.shape)} {gradient.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
    out, *of_inputs = (as_bhsd(t, case.implementation.layout) for t in (found.out, *found.gradients))
    return found._replace(out=out, gradients=Inputs(*of_inputs))
