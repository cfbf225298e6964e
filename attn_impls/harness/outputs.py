"""What the rounds of a case put out: compared with their first output, and held to the oracle where they differ from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backward import Backward
from .case import Case, CaseFailed, out_of_memory, validate
from .intact import as_integers
from .judge import Problem

MOST_JUDGED = 10  # deviating rounds of a case; beyond that, only those that lie farther off than any judged before


class Outputs:
    """The outputs of one case's rounds; `see` takes each after its time was taken, and keeps a copy of the first alone.

    `turn`, before each round, negates q, k, v and dout in place. Scores are bitwise the same then, and the output and the
    gradients negated: one left over from the round before shows, and so does what a kernel keeps of its inputs.
    Not seen: an output left over from the same round, which on a CPU may have several calls, and those of ranks.
    A kernel need not repeat itself bitwise (split-K, atomics), so a deviating output is judged by its own rows' budget.
    """

    def __init__(self, case: Case, problem: Problem, call: Callable[[], Any]):
        """call: what `problem` gave of the case to be timed."""
        self.case, self.problem = case, problem
        self._inputs = [*problem.native(case.implementation.layout), *([call.dout] if isinstance(call, Backward) else [])]
        self._negated = False  # the inputs, and the first output
        self.rounds = self._like_first = self._judged = self._unjudged = 0
        self._first: list[Tensor] = []
        self._farthest: list[float] = []  # of the outputs judged so far, by part
        self._wrong: list[tuple[float, str, int, int]] = []  # error over budget, in words, the round, and how many are like it

    @torch.no_grad()
    def turn(self) -> None:
        """Negate the inputs, and what their output is compared with."""
        for tensor in (*self._inputs, *self._first):
            tensor.neg_()
        self._negated = not self._negated

    def see(self, out: Any) -> None:
        """Compare the output of a round. Raises CaseFailed where it is none, or where there is no room to compare it."""
        try:
            self._see(out)
        except torch.OutOfMemoryError as error:  # not the kernel's
            raise CaseFailed(f"the check of its rounds' outputs ran out of memory: {out_of_memory(error)}") from None

    def _see(self, out: Any) -> None:
        self.rounds += 1
        if self.case.direction == "forward":
            validate(self.case, out)
        parts = [out] if self.case.direction == "forward" else list(out)  # or dq, dk and dv
        if not self._first:
            self._first = [part.clone() for part in parts]  # a kernel may hand out the same buffer again
            self._farthest = [0.0] * len(parts)
            self._like_first = 1
            return
        if all(map(_same, parts, self._first)):
            self._like_first += 1
            return
        distances = torch.stack([_distance(*pair) for pair in zip(parts, self._first, strict=True)]).tolist()
        farther = [one > most for one, most in zip(distances, self._farthest, strict=True)]
        if self._judged >= MOST_JUDGED and not any(farther):
            self._unjudged += 1
            return
        self._judged += 1
        self._farthest = list(map(max, self._farthest, distances))
        self._judge(parts, self.rounds, 1)

    def failure(self) -> str:
        """Why the rounds' outputs are wrong, or "". Judges the first, and lets go of it; the inputs are as before the rounds."""
        if self._negated:
            self.turn()
        self._judge(self._first, 1, self._like_first)
        self._first = []
        if not self._wrong:
            return ""
        errors, words, numbers, counts = zip(*self._wrong, strict=True)
        least, rest = "", ""
        if self._unjudged:
            least, rest = "at least ", f"; {self._unjudged} more that deviate were not judged"
        return (
            f"differs from the float64 oracle in {least}{sum(counts)} of {self.rounds} rounds, warm-up included "
            f"(first: round {min(numbers)}{rest}): {words[errors.index(max(errors))]}"
        )

    def _judge(self, parts: list[Tensor], number: int, count: int) -> None:
        error, words = self.problem.timed_error(self.case, [-part for part in parts] if self._negated else parts)
        if error > 1:
            self._wrong.append((error, words, number, count))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, in whatever memory: by their bits first."""
    bits, others = as_integers(one), as_integers(other)
    return (bits.dtype == others.dtype and torch.equal(bits, others)) or torch.equal(one, other)  # zeros of either sign


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """How far the row lies that is farthest off, relative to its size or that of all rows; infinity for NaN."""
    size, apart = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (other, one - other))
    return (apart / size.clamp(min=size.square().mean().sqrt())).max().nan_to_num(nan=torch.inf, posinf=torch.inf)
