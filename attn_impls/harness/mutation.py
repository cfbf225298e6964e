"""The check, checked: how many of the mutants it rejects, and how many of the implementations at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..presets import DEFAULT_PRESETS, cpu_sized, preset
from ..registry import REGISTRY, Implementation, Unsupported
from ..workload import Workload
from .case import Case, CaseFailed, build
from .inputs import Inputs
from .judge import Problem, Verdict
from .mutants import Mutant
from .oracle import Reference

# beyond the default presets: what they do not have
EXTRA = (
    "b1-h4kv2-s512-d64-causal-win128-bf16",
    "b2-h4kv2-s256-d128-causal-cap50-scale144-bf16",
    "b2-h6kv3-q113kv203-d64-causal-bf16",
    "b1-h3-q140kv70-d64-causal-bf16",  # rows that see nothing
    "b8-h8kv2-q1kv512-d128-causal-bf16",
    "b1-h6kv2-s195-d96v64-bf16",
)
WORKLOADS = (*(cpu_sized(preset(name)) for name in DEFAULT_PRESETS), *map(Workload.parse, EXTRA))
DIFFERS = 1e-9  # relative, of a row, in float64


@dataclass(frozen=True)
class Trial:
    """One mutant on one workload."""

    mutant: Mutant
    differs: bool  # from the oracle, in float64, on what it is judged on
    verdict: Verdict

    @property
    def must_die(self) -> bool:
        return self.differs and (self.mutant.shows is None or self.mutant.shows(self.verdict_of))

    verdict_of: Workload = None  # type: ignore[assignment]

    @property
    def killed(self) -> bool:
        return bool(self.verdict.failure)


class Bench:
    """One workload on a type of device, on which mutants and implementations are judged."""

    def __init__(self, workload: Workload, device: str, seed: int = 0):
        self.workload, self.device = workload, device
        self.problem = Problem(workload, device, seed)

    @cached_property
    def exact(self) -> list[tuple[Inputs, Reference]]:
        """Each of the judged inputs in float64, with its reference."""
        inputs = (self.problem.needles, self.problem.plain)
        return [(Inputs(*(t.double() for t in x)), r) for x, r in zip(inputs, self.problem.references, strict=True)]

    def differs(self, mutant: Mutant) -> bool:
        """Whether the mutant, computed in float64, differs from the oracle in any call that the judge would make."""
        kernel = mutant.build(self.workload)
        for inputs, known in self.exact:
            for _ in range(2):
                error = known.error(kernel(*inputs))
                if not bool((error <= DIFFERS).all()):  # NaN differs
                    return True
        return False

    def judge(self, mutant: Mutant) -> Verdict:
        case = Case(self.workload, Implementation(mutant.name, mutant.build), self.device)
        return self.problem.judge(case, mutant.build(self.workload))

    def try_out(self, mutant: Mutant) -> Trial:
        return Trial(mutant, self.differs(mutant), self.judge(mutant), self.workload)

    def false_rejection(self, implementation: Implementation) -> str | None:
        """Why a presumably right implementation is rejected, "" if it passes, None if it cannot do this."""
        case = Case(self.workload, implementation, self.device)
        try:
            kernel, _ = build(case, self.problem.plain.as_layout(implementation.layout))
            return self.problem.judge(case, kernel).failure
        except Unsupported:
            return None
        except CaseFailed as error:
            return str(error).splitlines()[0]


def available(device: str) -> list[Implementation]:
    return [i for i in REGISTRY.values() if not i.unavailable(device)]


def in_dtypes(workloads: tuple[Workload, ...], dtypes: tuple[torch.dtype, ...]) -> list[Workload]:
    return [w.replace(dtype=dtype) for dtype in dtypes for w in workloads]
