"""The verdict on a kernel's output: against the float64 oracle and against SDPA, on inputs that expose and plain ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..registry import Kernel, Unsupported, as_bhsd, in_layout
from ..workload import Workload
from . import backward
from .case import Built, Case, CaseFailed, build, call, evaluating
from .complaints import complaint_of, nan_rows, worst_row
from .inputs import Inputs, as_layout
from .known import Known
from .oracle import Reference
from .verdict import Verdict, worst_of

POISON_BYTES = 2**28
SMALL_PAIRS = 2**24  # of queries and keys: four layers of plain attention in memory that does not matter
TINY_PAIRS, TINY_CALLS, TINY_LAYERS = 2**11, 24, 16  # so small that many cost nothing: what goes wrong after some shows


class Problem(Known):
    """What is known of a workload, and the verdict on what a kernel makes of it."""

    def build(self, case: Case) -> Built:
        """The case's kernel after its first call, on the plain inputs. Raises as `case.build` does, and if it changed them."""
        self.mend()  # what somebody wrote on who raised, or answered probes
        native = self.plain.as_layout(case.implementation.layout)
        self.mark()
        built = build(case, native)
        self._unchanged(case, native, "call")
        return built

    def first_pass(self, case: Case, kernel: Kernel) -> backward.Pass:
        """A kernel's first forward and backward pass, on the plain inputs. Raises Unsupported where it has none, CaseFailed if it
        raises or changes them."""
        layout = case.implementation.layout
        native, dout = self.plain.as_layout(layout), as_layout(self.douts[1], layout)
        [found] = backward.passes(case, kernel, [native], [dout], first=True)
        if not torch.equal(dout, in_layout(self.douts[1], layout)):
            found = found._replace(complaint="changed dout, its upstream gradient,")
        self._unchanged(case, native, "backward pass", found.complaint)
        return found

    def _unchanged(self, case: Case, native: Inputs, what: str, complaint: str = "") -> None:
        complaint = complaint or complaint_of(None, self.plain, native, case.implementation.layout)
        if complaint:
            raise CaseFailed(f"{case.implementation.name} {self.mend() or complaint} in its first {what}")

    @property
    def _pairs(self) -> int:
        w = self.workload
        return w.batch * w.heads * w.q_len * w.kv_len

    @property
    def _tiny(self) -> bool:
        return self._pairs <= TINY_PAIRS

    @property
    def _layers(self) -> list[int]:
        """The inputs of the forward passes before a first backward pass. A kernel that keeps the tensors of fewer shows; of
        equal ones in turn it would not."""
        if self._pairs > SMALL_PAIRS:
            return [0, 1]
        return [0, 0, 1, 1] * (TINY_LAYERS // 4 if self._tiny else 1)

    def judge_gradients(self, case: Case, kernel: Kernel, first: backward.Pass | None = None) -> Verdict:
        """Differentiate the kernel twice or more on each of two inputs, in poisoned memory: the worst gradient's verdict.

        first: what `first_pass` gave. Raises CaseFailed if it raises: whether it has a backward pass, that has shown.
        """
        if case.implementation.approximate:
            raise Unsupported("gradients of approximate kernels have no budget")
        return self._unless_damaged(self._of_gradients(case, kernel, first))

    def _unless_damaged(self, verdict: Verdict) -> Verdict:
        damage = self.mend()
        return replace(verdict, complaint=damage) if damage else verdict

    def _of_gradients(self, case: Case, kernel: Kernel, first: backward.Pass | None) -> Verdict:
        layout = case.implementation.layout
        natives = [inputs.as_layout(layout) for inputs in self.trained]
        douts = [as_layout(dout, layout) for dout in self.douts]
        right, right_gradients, sdpas = self.training_references, self.gradient_references, self.sdpa_gradients
        self.mark()
        layers = self._layers
        repeated: tuple[list[backward.Pass], list[backward.Pass]] = [], []  # on the needles, on the plain inputs
        while len(repeated[1]) < (TINY_LAYERS if self._tiny else 2):
            poison(self.workload, self.device)
            x, dout = [natives[n] for n in layers], [douts[n] for n in layers]
            passes = backward.passes(case, kernel, x, dout, in_order=bool(repeated[1]) and self._tiny)
            for n, one in zip(layers, passes, strict=True):
                repeated[n].append(one)
        found: dict[str, list[Verdict]] = {name: [] for name in "qkv"}
        for n, (original, native) in enumerate(zip(self.trained, natives, strict=True)):
            complaint = complaint_of(None, original, native, layout)
            if not complaint and not torch.equal(in_layout(self.douts[n], layout), douts[n]):
                complaint = "changed dout, its upstream gradient"
            verdict = self._training_output(right[n], repeated[n], complaint)
            if verdict.failure:
                return verdict
            for name in "qkv":
                ours, theirs = [getattr(one.gradients, name) for one in repeated[n]], sdpas and getattr(sdpas[n], name)
                found[name].append(self._gradient_verdict(name, right_gradients[n][name], ours, theirs))
        verdict = worst_of(found)
        if first:
            verdict = with_first(verdict, "training pass", worst_row(first.out, first.out, self._plain_reference, "the output"))
            verdict = with_first(verdict, "backward pass", self._worst(case, first.gradients))
        return verdict

    def _training_output(self, known: Reference, repeated: list[backward.Pass], complaint: str) -> Verdict:
        """Of the output that a kernel returns when a gradient is asked for: often by other code than without."""
        outs = [one.out for one in repeated]
        of, repeatable = "the output of its training pass", _alike(outs)
        complaint = complaint or next(
            filter(None, (*(nan_rows(out, of) for out in outs), *(one.complaint for one in repeated))), ""
        )
        if complaint:
            return Verdict(math.inf, math.inf, None, None, repeatable, complaint=complaint, of=of)
        worst, drift = (max(map(figure, outs)) for figure in (known.over_budget, known.drift_over_budget))
        return Verdict(worst, known.rms_over_budget(outs[0]), None, None, repeatable, drift, of=of)

    def _gradient_verdict(self, name: str, known: Reference, repeated: list[torch.Tensor], sdpa: torch.Tensor | None) -> Verdict:
        """Of one gradient for one of the inputs."""
        repeatable = _alike(repeated)
        complaint = nan_rows(repeated[0], f"d{name}")
        if complaint:
            return Verdict(math.inf, math.inf, None, None, repeatable, complaint=complaint, of=f"d{name}")
        heads = self.gradient_heads[name]
        ours, theirs = [one[:, heads] for one in repeated], None if sdpa is None else sdpa[:, heads]
        return Verdict(
            max(map(known.over_budget, ours)),
            known.rms_over_budget(ours[0]),
            None if theirs is None else max(known.apart(one, theirs, known) for one in ours),
            None if theirs is None else known.over_budget(theirs),
            repeatable,
            max(map(known.drift_over_budget, ours)),
            of=f"d{name}",
        )

    def judge(self, case: Case, kernel: Kernel, first: torch.Tensor | None = None) -> Verdict:
        """Run the kernel twice, or TINY_CALLS times, on each of two inputs, every other time without gradients, in poisoned
        memory, and compare. Raises CaseFailed if it raises.

        Both inputs lie in the same tensors, one after the other: nothing of the first may be kept for the second.
        first: what its first call, on the plain inputs, put out, in its layout.
        """
        return self._unless_damaged(self._of_outputs(case, kernel, first))

    def _of_outputs(self, case: Case, kernel: Kernel, first: torch.Tensor | None) -> Verdict:
        approximate, layout = case.implementation.approximate, case.implementation.layout
        errors, rms, drifts, apart, sdpa_errors = [], [], [], [], []
        sdpas = self._quiet_sdpa if approximate else self.sdpa
        repeatable, native = True, self.judged(approximate)[0].as_layout(layout)
        for n, original in enumerate(self.judged(approximate)):
            exact, known = self.exact(approximate)[n], self.known(approximate)[n]
            for there, values in zip(native, original, strict=True):
                there.copy_(in_layout(values, layout))
            self.mark()
            outs = []
            for turn in range(TINY_CALLS if self._tiny else 2):
                poison(self.workload, self.device)
                with evaluating(case) if turn % 2 else contextlib.nullcontext():
                    out = call(case, kernel, native)
                outs.append(as_bhsd(out, layout).clone())  # a kernel may hand out the same buffer again
            repeatable &= _alike(outs)
            complaint = complaint_of(outs[0], original, native, layout)
            if complaint:
                return Verdict(float("inf"), float("inf"), None, None, repeatable, complaint=complaint)
            errors += [known.over_budget(out) for out in outs]
            drifts += [known.drift_over_budget(out) for out in outs]
            rms.append(known.rms_over_budget(outs[0]))
            if sdpas:
                apart += [known.apart(out, sdpas[n], exact) for out in outs]
                sdpa_errors.append(exact.over_budget(sdpas[n]))
        sdpa = max(apart, default=None), max(sdpa_errors, default=None)
        verdict = Verdict(max(errors), max(rms), *sdpa, repeatable, max(drifts))
        return verdict if first is None else with_first(verdict, "call", self.timed_error(case, [first]))

    def timed_error(self, case: Case, parts: Sequence[torch.Tensor]) -> tuple[float, str]:
        """How wrong a timed call's output, or dq, dk and dv, is: the worst row's share of its budget, and that in words."""
        return self._worst(case, [as_bhsd(part, case.implementation.layout) for part in parts])

    def _worst(self, case: Case, parts: Sequence[torch.Tensor]) -> tuple[float, str]:
        """The same of parts that are "bhsd"."""
        if case.direction == "forward":
            return worst_row(parts[0], parts[0], self.known(case.implementation.approximate)[1], "")
        known, heads = self.gradient_references[1], self.gradient_heads
        named = zip("qkv", parts, strict=True)
        found = [worst_row(part, part[:, heads[name]], known[name], f"d{name}") for name, part in named]
        return max(found, key=lambda one: one[0])


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:])


def with_first(verdict: Verdict, what: str, found: tuple[float, str]) -> Verdict:
    """A verdict on later calls with what was found of the first: its error as a multiple of the budget, and in words."""
    error, words = found
    if verdict.failure or error <= 1:
        return verdict
    return replace(verdict, complaint=f"differs from the float64 oracle in its first {what} alone: {words}")


def poison(w: Workload, device: str) -> None:
    """Leave NaN in the memory that the allocator will hand out next: what writes nothing must not look right."""
    for shape in set(w.shapes().values()):
        blocks = min(64, max(2, POISON_BYTES // (math.prod(shape) * w.dtype.itemsize)))  # free lists hold many small ones
        for _ in [torch.full(shape, float("nan"), dtype=w.dtype, device=device) for _ in range(blocks)]:
            pass
