"""The check, checked: how many of the mutants it rejects, and how many of the implementations at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..registry import REGISTRY, Implementation, Kernel, Unsupported
from ..workload import Workload
from .case import Case, CaseFailed
from .criteria import CRITERIA
from .gradient_mutants import GRADIENT_MUTANTS
from .inputs import Inputs
from .judge import Problem
from .mutants import MUTANTS, Mutant
from .oracle import Reference, attend
from .verdict import Verdict

# The default presets once more cut down, to what takes milliseconds on a CPU, and what they do not have
WORKLOADS = tuple(
    map(
        Workload.parse,
        (
            "b1-h2-s192-d128-bf16",
            "b1-h2-s192-d128-causal-bf16",
            "b1-h4kv2-s130-d128-causal-bf16",
            "b5-h14kv2-s65-d96-causal-bf16",
            "b2-h6kv3-s63-d64-causal-bf16",
            "b1-h4kv2-s195-d64-causal-win100-bf16",
            "b1-h4kv2-s130-d64-causal-cap50-scale144-bf16",
            "b2-h6kv3-q50kv203-d64-causal-bf16",
            "b1-h3kv1-q140kv70-d64-causal-bf16",  # rows that see nothing
            "b2-h8kv2-q1kv690-d64-causal-bf16",
            "b1-h6kv2-s150-d96v64-bf16",
            "b2-h8kv2-q5kv133-d64-causal-win66-bf16",  # few queries
            "b3-h6kv2-q77kv133-d80-causal-win37-cap20-scale50-bf16",  # all at once
        ),
    )
)
DIFFERS = 1e-9  # relative, of a row, in float64


@dataclass(frozen=True)
class Trial:
    """One mutant on one workload."""

    mutant: Mutant
    workload: Workload
    differs: bool  # from the oracle, in float64, on what it is judged on
    verdict: Verdict
    caught_by: dict[str, bool]  # by other projects' criteria, on standard normal inputs

    @property
    def must_die(self) -> bool:
        return self.differs and (self.mutant.shows is None or self.mutant.shows(self.workload))

    @property
    def killed(self) -> bool:
        return bool(self.verdict.failure)

    @property
    def survived(self) -> bool:
        return self.must_die and not self.killed

    @property
    def wrongly_killed(self) -> bool:
        """Rejected, though it does nothing wrong here."""
        return self.killed and not self.differs


def _exact(inputs: Inputs) -> Inputs:
    return Inputs(*(tensor.double() for tensor in inputs))


class Bench:
    """One workload on a type of device, on which mutants and implementations are judged."""

    def __init__(self, workload: Workload, device: str, seed: int = 0):
        self.workload, self.device = workload, device
        self.problem = Problem(workload, device, seed)

    @cached_property
    def exact(self) -> list[tuple[Inputs, Reference]]:
        """Each of the judged inputs in float64, with its reference."""
        return [(_exact(x), r) for x, r in zip(self.problem.judged(False), self.problem.references, strict=True)]

    def differs(self, mutant: Mutant) -> bool:
        """Whether the mutant, computed in float64, differs from the oracle in one of two calls on each of the judged inputs."""
        kernel = mutant.build(self.workload)
        for inputs, known in self.exact:
            for _ in range(2):
                error = known.error(kernel(*inputs))
                if not bool((error <= DIFFERS).all()):  # NaN differs
                    return True
        return False

    def judge(self, mutant: Mutant) -> Verdict:
        case = Case(self.workload, Implementation(mutant.name, mutant.build), self.device)
        return self._verdict(case, mutant.build(self.workload))

    def _verdict(self, case: Case, kernel: Kernel) -> Verdict:
        return self.problem.judge(case, kernel)

    def _built(self, case: Case) -> Kernel:
        """The case's kernel, after its first call. Raises Unsupported where it cannot do this."""
        return self.problem.build(case).kernel

    @cached_property
    def plain_run(self) -> Tensor:
        return attend(self.workload, self.problem.plain, None, self.workload.dtype)

    @cached_property
    def right(self) -> Tensor:
        """The float64 answer to the standard normal inputs, every row."""
        return attend(self.workload, self.problem.plain, None, torch.float64)

    def caught_by(self, mutant: Mutant) -> dict[str, bool]:
        """Which of the criteria reject the second output on standard normal inputs."""
        kernel = mutant.build(self.workload)
        for inputs in (self.problem.needles, self.problem.plain):
            out = kernel(*inputs)  # a kernel that remembers has something to remember
        return {name: not passes(out, self.right, self.plain_run) for name, passes in CRITERIA.items()}

    @property
    def mutants(self) -> list[Mutant]:
        return MUTANTS

    def try_out(self, mutant: Mutant) -> Trial:
        return Trial(mutant, self.workload, self.differs(mutant), self.judge(mutant), self.caught_by(mutant))

    def false_rejection(self, implementation: Implementation) -> str | None:
        """Why a presumably right implementation is rejected, "" if it passes, None if it cannot do this."""
        case = Case(self.workload, implementation, self.device)
        try:
            return self._verdict(case, self._built(case)).failure
        except Unsupported:
            return None
        except CaseFailed as error:
            return str(error).splitlines()[0]


class GradientBench(Bench):
    """The same for gradients: of mutants whose backward pass is broken, and of implementations that have one."""

    @property
    def mutants(self) -> list[Mutant]:
        return GRADIENT_MUTANTS

    @cached_property
    def _exact_leaves(self) -> list[Inputs]:
        return [_exact(inputs) for inputs in self.problem.trained]

    def differs(self, mutant: Mutant) -> bool:
        kernel = mutant.build(self.workload)
        for n, known in enumerate(self.problem.gradient_references):
            dout = self.problem.douts[n].double()
            for _ in range(2):
                leaves = [tensor.detach().requires_grad_() for tensor in self._exact_leaves[n]]
                found = torch.autograd.grad(kernel(*leaves), leaves, dout)
                heads = self.problem.gradient_heads
                errors = [known[name].error(one[:, heads[name]]) for name, one in zip("qkv", found, strict=True)]
                if not all(bool((error <= DIFFERS).all()) for error in errors):
                    return True
        return False

    def _verdict(self, case: Case, kernel: Kernel) -> Verdict:
        return self.problem.judge_gradients(case, kernel)

    def _built(self, case: Case) -> Kernel:
        if not case.implementation.backward:
            raise Unsupported("forward only")
        kernel = super()._built(case)
        self.problem.first_pass(case, kernel)
        return kernel

    def caught_by(self, mutant: Mutant) -> dict[str, bool]:  # noqa: ARG002
        return {}  # the other projects' criteria are of outputs


def available(device: str) -> list[Implementation]:
    return [implementation for implementation in REGISTRY.values() if not implementation.unavailable(device)]


def report(
    workloads: list[Workload], device: str, implementations: list[Implementation], kind: type[Bench] = Bench, seed: int = 0
) -> Iterator[str]:
    """The table of every mutant on every workload, then what was killed, by whom, and what was rejected wrongly."""
    benches = [kind(workload, device, seed) for workload in workloads]
    mutants = benches[0].mutants
    trials: dict[str, list[Trial]] = {mutant.name: [] for mutant in mutants}
    rejected: list[str] = []
    judged = 0
    for workload, bench in zip(workloads, benches, strict=True):
        for mutant in mutants:
            trials[mutant.name].append(bench.try_out(mutant))
        for implementation in implementations:
            complaint = bench.false_rejection(implementation)
            judged += complaint is not None
            rejected += [f"  {workload}-{implementation.name}: {complaint}"] if complaint else []
    yield "worst row's error over its budget (above 1: rejected); ·: right here; (…): within what the dtype excuses"
    yield from (f"  {chr(ord('a') + n)}  {workload}" for n, workload in enumerate(workloads))
    width = max(map(len, trials))
    yield " " * width + "".join(f"{chr(ord('a') + n):>9}" for n in range(len(workloads)))
    for name, row in trials.items():
        yield f"{name:<{width}}" + "".join(f"{_cell(trial):>9}" for trial in row)
    every = [trial for row in trials.values() for trial in row]
    must = [trial for trial in every if trial.must_die]
    killed = sum(trial.killed for trial in must)
    yield f"kill rate: {killed} of {len(must)} ({100 * killed / max(1, len(must)):.1f} %), {len(mutants)} mutants on {device}"
    for name in every[0].caught_by:
        caught = sum(trial.caught_by[name] for trial in must)
        yield f"  {name + ', randn':<20} {caught} of {len(must)} ({100 * caught / max(1, len(must)):.1f} %)"
    wrongly = [trial for trial in every if trial.wrongly_killed]
    yield f"false rejections: {len(rejected)} of {judged} implementations on workloads; {len(wrongly)} mutants that are right"
    yield from rejected
    yield from (f"  {trial.workload}-{trial.mutant.name}: {trial.verdict.failure}" for trial in wrongly)
    yield from (f"SURVIVED: {trial.mutant.name} on {trial.workload}" for trial in must if not trial.killed)


def _cell(trial: Trial) -> str:
    if not trial.differs:
        return "WRONG" if trial.killed else "·"
    factor = max(trial.verdict.error_over_budget, trial.verdict.drift_over_budget)
    text = f"{factor:.3g}" if factor < 1e4 else f"{factor:.0e}".replace("e+0", "e")
    return text if trial.must_die else f"({text})"
