"""The verdict on a kernel's output: against the float64 oracle and against SDPA, on inputs that expose and plain ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from ..registry import REGISTRY, Kernel, Unsupported, as_bhsd, in_layout
from ..workload import Workload
from . import backward, gradients
from . import inputs as make
from .approximate import loosened
from .case import Built, Case, CaseFailed, DeviceLost, build, call
from .complaints import complaint_of, nan_rows, worst_row
from .inputs import Inputs, as_layout
from .oracle import Reference, reference
from .verdict import Verdict, worst_of

POISON_BYTES = 2**28
ALONE = "differs from the float64 oracle in its first"
SMALL_PAIRS = 2**24  # of queries and keys: four layers of plain attention in memory that does not matter


class Problem:
    """The tensors of one workload and the right answers to them; each made when first asked for."""

    def __init__(self, workload: Workload, device: str, seed: int):
        self.workload, self.device, self.seed = workload, device, seed
        self._natives: dict[str, Inputs] = {}
        self._classes: dict[bool | str, tuple[Reference, Reference]] = {}

    @cached_property
    def plain(self) -> Inputs:
        return make.plain(self.workload, self.device, self.seed)

    @cached_property
    def needles(self) -> Inputs:
        return make.needles(self.workload, self.device, self.seed + 1)

    @cached_property
    def references(self) -> tuple[Reference, Reference]:
        """For the needles and for the plain inputs."""
        return self._of_needles(self.needles), self._plain_reference

    def _of_needles(self, needles: Inputs) -> Reference:
        return reference(self.workload, needles, self.seed, make.needle_rows(self.workload, self.seed + 1))

    @cached_property
    def _plain_reference(self) -> Reference:
        return reference(self.workload, self.plain, self.seed)

    @cached_property
    def trained(self) -> tuple[Inputs, Inputs]:
        """What gradients are judged on: needles and plain inputs.

        Without common keys, which would add up what rounding leaves of Σ ds, and products past float16, of which cuDNN's
        backward pass made NaN.
        """
        return make.pointed(self.workload, self.device, self.seed + 1, huge=False), self.plain

    @cached_property
    def training_references(self) -> tuple[Reference, Reference]:
        """The right outputs to them."""
        return self._of_needles(self.trained[0]), self._plain_reference

    def judged(self, approximate: bool | str) -> tuple[Inputs, Inputs]:
        """The needles and the plain inputs. For the approximate the needles are quiet: they may hold V in float16."""
        return (self._quiet if approximate else self.needles), self.plain

    @cached_property
    def _quiet(self) -> Inputs:
        return make.needles(self.workload, self.device, self.seed + 1, quiet=True)

    @cached_property
    def _quiet_reference(self) -> Reference:
        return self._of_needles(self._quiet)

    def exact(self, approximate: bool | str) -> tuple[Reference, Reference]:
        """The answers to what is judged, with the budgets of the workload's dtype."""
        return (self._quiet_reference, self._plain_reference) if approximate else self.references

    def known(self, approximate: bool | str) -> tuple[Reference, Reference]:
        """The same with the budgets of the class that an implementation declares."""
        if not approximate:
            return self.references
        if approximate not in self._classes:
            both = zip(self.judged(approximate), self.exact(approximate), strict=True)
            one, two = (loosened(self.workload, x, known, approximate) for x, known in both)
            self._classes[approximate] = one, two
        return self._classes[approximate]

    @cached_property
    def sdpa(self) -> tuple[torch.Tensor, ...] | None:
        """SDPA's outputs for the needles and the plain inputs; None where it cannot do this workload."""
        return self._of_sdpa(self.needles, self.plain)

    @cached_property
    def _quiet_sdpa(self) -> tuple[torch.Tensor, ...] | None:
        return self._of_sdpa(self._quiet, self.plain)

    def _of_sdpa(self, *inputs: Inputs) -> tuple[torch.Tensor, ...] | None:
        case = Case(self.workload, REGISTRY["sdpa"], self.device)
        try:
            kernel = build(case, inputs[0]).kernel
            return tuple(call(case, kernel, x) for x in inputs)
        except DeviceLost:  # SDPA broke it, and not the case that asked
            raise
        except (Unsupported, CaseFailed):  # SDPA's own test says which
            return None

    @cached_property
    def douts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Upstream gradients for the needles, faint (but in float16) as behind a mean over many tokens, some of them masked,
        and for the plain inputs."""
        first, second = (gradients.upstream(self.workload, self.device, seed) for seed in (self.seed + 1, self.seed))
        first = gradients.masked(first, self.seed)
        return first if self.workload.dtype == torch.float16 else first * make.FAINT, second

    def call(self, case: Case, kernel: Kernel) -> Callable[[], Any]:
        """What is timed of a case: its kernel, its gradients, or both, on the plain inputs in its layout."""
        layout = case.implementation.layout
        native = self.native(layout)
        if case.direction == "forward":
            return partial(kernel, *native)
        return backward.CALLS[case.direction](kernel, native, as_layout(self.douts[1], layout))

    def native(self, layout: str) -> Inputs:
        """The plain inputs in a layout, the same tensors for every case: where they lie in memory can cost some percent."""
        if layout not in self._natives:
            self._natives[layout] = self.plain.as_layout(layout)
        return self._natives[layout]

    def changed(self, layout: str) -> str:
        """What the calls in this layout have done to their inputs, "" if nothing."""
        return complaint_of(None, self.plain, self.native(layout), layout)

    @contextmanager
    def handing_out(self, layout: str) -> Iterator[None]:
        """After any failure, make the inputs in this layout anew for whoever is next: a call may have changed them."""
        try:
            yield
        except BaseException:
            self._natives.pop(layout, None)
            raise

    @cached_property
    def gradient_heads(self) -> dict[str, list[int]]:
        """The heads of q, k and v whose gradients are known."""
        kv_heads = gradients.sample_kv_heads(self.workload, self.device)
        return {"q": gradients.query_heads(self.workload, kv_heads), "k": kv_heads, "v": kv_heads}

    @cached_property
    def gradient_references(self) -> tuple[dict[str, Reference], dict[str, Reference]]:
        """Of dq, dk and dv, by "q", "k" and "v", for the needles and for the plain inputs."""
        known = zip(self.trained, self.douts, strict=True)
        first, second = (gradients.reference(self.workload, x, dout, self.gradient_heads["k"]) for x, dout in known)
        return first, second

    @cached_property
    def sdpa_gradients(self) -> tuple[Inputs, Inputs] | None:
        """SDPA's gradients for the needles and the plain inputs; None where it has none."""
        case = Case(self.workload, REGISTRY["sdpa"], self.device, "backward")
        try:
            kernel = build(case, self.plain).kernel
            known = zip(self.trained, self.douts, strict=True)
            first, second = (backward.gradients(case, kernel, x, dout, first=True) for x, dout in known)
            return first, second
        except DeviceLost:
            raise
        except (Unsupported, CaseFailed):
            return None

    def build(self, case: Case) -> Built:
        """The case's kernel after its first call, on the plain inputs. Raises as `case.build` does, and if it changed them."""
        native = self.plain.as_layout(case.implementation.layout)
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
            raise CaseFailed(f"{case.implementation.name} {complaint} in its first {what}")

    @property
    def _small(self) -> bool:
        w = self.workload
        return w.batch * w.heads * w.q_len * w.kv_len <= SMALL_PAIRS

    def judge_gradients(self, case: Case, kernel: Kernel, first: backward.Pass | None = None) -> Verdict:
        """Differentiate the kernel twice on each of two inputs, in poisoned memory, and compare: the worst gradient's verdict.

        first: what `first_pass` gave. Raises CaseFailed if it raises: whether it has a backward pass, that has shown.
        """
        if case.implementation.approximate:
            raise Unsupported("gradients of approximate kernels have no budget")
        layout = case.implementation.layout
        natives = [inputs.as_layout(layout) for inputs in self.trained]
        douts = [as_layout(dout, layout) for dout in self.douts]
        # four layers at once, or two: a kernel that keeps the tensors of fewer shows; of equal ones in turn it would not
        layers = [0, 0, 1, 1] if self._small else [0, 1]
        twice: tuple[list[backward.Pass], list[backward.Pass]] = [], []  # on the needles, on the plain inputs
        while len(twice[1]) < 2:
            poison(self.workload, self.device)
            passes = backward.passes(case, kernel, [natives[n] for n in layers], [douts[n] for n in layers])
            for n, one in zip(layers, passes, strict=True):
                twice[n].append(one)
        found: dict[str, list[Verdict]] = {name: [] for name in "qkv"}
        for n, (original, native) in enumerate(zip(self.trained, natives, strict=True)):
            complaint = complaint_of(None, original, native, layout)
            if not complaint and not torch.equal(in_layout(self.douts[n], layout), douts[n]):
                complaint = "changed dout, its upstream gradient"
            verdict = self._training_output(self.training_references[n], twice[n], complaint)
            if verdict.failure:
                return verdict
            for name in "qkv":
                known, sdpa = self.gradient_references[n][name], self.sdpa_gradients and self.sdpa_gradients[n]
                ours, theirs = [getattr(one.gradients, name) for one in twice[n]], sdpa and getattr(sdpa, name)
                found[name].append(self._gradient_verdict(name, known, ours, theirs))
        verdict = worst_of(found)
        if first and not verdict.failure:
            error, words = worst_row(first.out, first.out, self._plain_reference, "the output")
            verdict = replace(verdict, complaint=f"{ALONE} training pass alone: {words}") if error > 1 else verdict
        return self._with_first(verdict, case, first and first.gradients)

    def _training_output(self, known: Reference, twice: list[backward.Pass], complaint: str) -> Verdict:
        """Of the output that a kernel returns when a gradient is asked for: often by other code than without."""
        outs = [one.out for one in twice]
        of, repeatable = "the output of its training pass", torch.equal(*outs)
        complaint = complaint or next(filter(None, (*(nan_rows(out, of) for out in outs), *(one.complaint for one in twice))), "")
        if complaint:
            return Verdict(math.inf, math.inf, None, None, repeatable, complaint=complaint, of=of)
        worst, drift = (max(map(figure, outs)) for figure in (known.over_budget, known.drift_over_budget))
        return Verdict(worst, known.rms_over_budget(outs[0]), None, None, repeatable, drift, of=of)

    def _gradient_verdict(self, name: str, known: Reference, twice: list[torch.Tensor], sdpa: torch.Tensor | None) -> Verdict:
        """Of one gradient for one of the inputs."""
        repeatable = torch.equal(*twice)
        complaint = nan_rows(twice[0], f"d{name}")
        if complaint:
            return Verdict(math.inf, math.inf, None, None, repeatable, complaint=complaint, of=f"d{name}")
        heads = self.gradient_heads[name]
        ours, theirs = [one[:, heads] for one in twice], None if sdpa is None else sdpa[:, heads]
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
        """Run the kernel twice on each of two inputs, in poisoned memory, and compare. Raises CaseFailed if it raises.

        Both inputs lie in the same tensors, one after the other: nothing of the first may be kept for the second.
        first: what its first call, on the plain inputs, put out, in its layout.
        """
        approximate, layout = case.implementation.approximate, case.implementation.layout
        errors, rms, drifts, apart, sdpa_errors = [], [], [], [], []
        sdpas = self._quiet_sdpa if approximate else self.sdpa
        repeatable, native = True, self.judged(approximate)[0].as_layout(layout)
        for n, original in enumerate(self.judged(approximate)):
            exact, known = self.exact(approximate)[n], self.known(approximate)[n]
            for there, values in zip(native, original, strict=True):
                there.copy_(in_layout(values, layout))
            outs = []
            for _ in range(2):
                poison(self.workload, self.device)
                out = call(case, kernel, native)
                outs.append(as_bhsd(out, layout).clone())  # a kernel may hand out the same buffer again
            repeatable &= torch.equal(*outs)
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
        return self._with_first(verdict, case, None if first is None else [as_bhsd(first, layout)])

    def _with_first(self, verdict: Verdict, case: Case, first: Sequence[torch.Tensor] | None) -> Verdict:
        """A verdict on later calls, and on the first one's output, or dq, dk and dv."""
        if first is None or verdict.failure:
            return verdict
        error, words = self._worst(case, first)
        what = "call" if case.direction == "forward" else "backward pass"
        return replace(verdict, complaint=f"{ALONE} {what} alone: {words}") if error > 1 else verdict

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


def poison(w: Workload, device: str) -> None:
    """Leave NaN in the memory that the allocator will hand out next: what writes nothing must not look right."""
    for shape in set(w.shapes().values()):
        blocks = min(64, max(2, POISON_BYTES // (math.prod(shape) * w.dtype.itemsize)))  # free lists hold many small ones
        for _ in [torch.full(shape, float("nan"), dtype=w.dtype, device=device) for _ in range(blocks)]:
            pass
