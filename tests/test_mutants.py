"""The check against deliberately broken kernels: each is rejected wherever, in float64, it differs from the oracle at all."""

import math
from functools import cache

import pytest
import torch

from attn_impls.harness import mutation
from attn_impls.harness.criteria import CRITERIA
from attn_impls.harness.mutants import MUTANTS, Mutant, Steps, broken
from attn_impls.harness.mutation import WORKLOADS, Bench, report
from attn_impls.registry import Implementation
from attn_impls.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = [w for w in WORKLOADS if w.q_len > 1 and (w.softcap or w.offset > 0)]
TRIED = [*WORKLOADS, *(w.replace(dtype=dtype) for w in FEW for dtype in (torch.float16, torch.float32))]
QUICK = [
    w for w in WORKLOADS if w.window or w.softcap or w.blind_rows or w.q_len == 1
]  # on which each mutant that is one anywhere shows
QUICK += [FEW[-1].replace(dtype=dtype) for dtype in (torch.float16, torch.float32)]
PARAMETERS = [pytest.param(w, id=str(w), marks=[] if w in QUICK else [pytest.mark.slow]) for w in TRIED]


@cache
def bench(w: Workload, device: str) -> Bench:
    return Bench(w, device)


@cache
def differs(w: Workload, device: str, mutant: Mutant) -> bool:
    return bench(w, device).differs(mutant)


@pytest.mark.parametrize("w", PARAMETERS)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_rejected_exactly_where_they_differ(suite, mutant, w):
    known = bench(w, suite.device)
    wrong = differs(w, suite.device, mutant)
    verdict = known.judge(mutant)
    if wrong and mutant.shows and not mutant.shows(w):
        return  # rounding that the dtype excuses may pass or not
    assert bool(verdict.failure) == wrong, verdict


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies_somewhere(suite, mutant):
    assert any(differs(w, suite.device, mutant) for w in QUICK if not mutant.shows or mutant.shows(w))


@pytest.mark.parametrize("w", TRIED, ids=str)
def test_the_steps_without_a_wrong_one_are_right(suite, w):
    right = Mutant("none", "", broken())
    assert not differs(w, suite.device, right)
    assert not bench(w, suite.device).judge(right).failure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_of_others_accept_what_is_right_and_reject_zeros(suite, name, dtype):
    known = bench(WORKLOADS[4].replace(dtype=dtype), suite.device)
    out = Steps()(known.workload, *known.problem.plain)
    assert CRITERIA[name](out, known.right, known.plain_run)
    for wrong in (torch.zeros_like(out), torch.full_like(out, math.nan)):
        assert not CRITERIA[name](wrong, known.right, known.plain_run)


def test_the_report_counts_what_survives(suite, monkeypatch):
    blind = Mutant("blind", "", broken())
    monkeypatch.setattr(mutation, "MUTANTS", [MUTANTS[0], blind])
    monkeypatch.setattr(Bench, "differs", lambda *_: True)
    wrong = Implementation("wrong", MUTANTS[0].build)
    lines = list(report([WORKLOADS[3]], suite.device, [wrong]))
    assert any(line.startswith("kill rate: 1 of 2 (50.0 %)") for line in lines)
    assert any(line.startswith("false rejections: 1 of 1") for line in lines)
    assert lines[-1] == f"SURVIVED: blind on {WORKLOADS[3]}"
