"""A workload's problem: its tensors, the right answers to them with what errors are allowed, and what SDPA makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from ..registry import REGISTRY, Kernel, Unsupported
from ..workload import Workload
from . import backward, gradients
from . import inputs as make
from .approximate import loosened
from .case import Case, CaseFailed, DeviceLost, build, call
from .complaints import complaint_of
from .inputs import Inputs, as_layout
from .intact import Marks
from .oracle import Reference, reference


class Known:
    """The tensors of one workload and the right answers to them; each made when first asked for."""

    def __init__(self, workload: Workload, device: str, seed: int):
        self.workload, self.device, self.seed = workload, device, seed
        self._natives: dict[str, Inputs] = {}
        self._classes: dict[bool | str, tuple[Reference, Reference]] = {}
        self._marks = Marks()
        self.remade = 0  # times: who keeps answers of this problem must ask anew

    def mark(self) -> None:
        """Remember what all that is known by now looks like, before a kernel runs that may write where it should not."""
        made = {name: vars(self)[name] for name in KEPT if name in vars(self)}
        self._marks.add(made | {f"budgets of {name}": loosened for name, loosened in self._classes.items()})

    def mend(self) -> str:
        """What has changed since it was marked, in words, "" if nothing. If so, all is made anew for whoever is next."""
        return self._remake(name) if (name := self._marks.broken()) else ""

    def _remake(self, name: str) -> str:
        for kept in KEPT:
            vars(self).pop(kept, None)
        self._natives, self._classes, self._marks = {}, {}, Marks()
        self.remade += 1
        return f"wrote outside its tensors: the judge's own changed ({name.replace('_', ' ').strip()})"

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
        return (self._quiet_needles if approximate else self.needles), self.plain

    @cached_property
    def _quiet_needles(self) -> Inputs:
        return make.needles(self.workload, self.device, self.seed + 1, quiet=True)

    @cached_property
    def _quiet_reference(self) -> Reference:
        return self._of_needles(self._quiet_needles)

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
        return self._of_sdpa(self._quiet_needles, self.plain)

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
        """What the calls in this layout have done to their inputs, or to what is not theirs, "" if nothing."""
        if damage := self.mend():
            return damage
        if complaint := complaint_of(None, self.plain, self.native(layout), layout):
            return complaint
        others = (other for other, native in self._natives.items() if complaint_of(None, self.plain, native, other))
        return self._remake(f"inputs, {other}") if (other := next(others, "")) else ""

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


KEPT = tuple(name for name, value in vars(Known).items() if isinstance(value, cached_property))
