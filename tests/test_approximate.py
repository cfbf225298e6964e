"""The class of approximate kernels: emulated int8 and fp8 kernels pass in it, the same kernels broken do not."""

from functools import cache

import pytest
import torch

from attn_impls import attention
from attn_impls.harness import approximate, oracle
from attn_impls.harness.case import Case
from attn_impls.harness.judge import Problem
from attn_impls.harness.mutants import MUTANTS, Mutant, broken
from attn_impls.harness.mutation import DIFFERS, WORKLOADS, Bench
from attn_impls.harness.oracle import Reference
from attn_impls.registry import PRECISIONS, Implementation
from attn_impls.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

GQA, DECODE, CAPPED = WORKLOADS[4], WORKLOADS[9], WORKLOADS[6]
WINDOWED = WORKLOADS[5]
DTYPES = [w.replace(dtype=dtype) for w in (GQA, DECODE) for dtype in (torch.float16, torch.float32)]
RIGHT = Mutant("none", "", broken())


def few(workloads, quick=(GQA, DECODE, CAPPED, WINDOWED)):
    """Parameters: some cover every feature, the others are slow for what they add."""
    return [pytest.param(w, id=str(w), marks=[] if w in quick else [pytest.mark.slow]) for w in workloads]


@cache
def bench(w: Workload, device: str) -> Bench:
    return Bench(w, device)


def in_steps(x, block, largest=127):
    """Symmetric integers, one scale for each block of tokens, ties away from zero, as SageAttention's quantiser has it."""
    parts = []
    for part in x.split(block, 2):
        step = (part.abs().amax((2, 3), keepdim=True) / largest).clamp(min=1e-30)
        parts.append((part / step + 0.5 * part.sign()).trunc() * step)
    return torch.cat(parts, 2)


def int8(kernel, largest=127):
    """A kernel with SageAttention's arithmetic around it: k smoothed, q in blocks of 128 and k of 64, v in fp16."""

    def call(q, k, v):
        smooth = (k - k.mean(2, keepdim=True)).float()
        return kernel(in_steps(q.float(), 128, largest), in_steps(smooth, 64, largest), v.half().float()).to(q.dtype)

    return call


def int8_by_token(kernel):
    return lambda q, k, v: kernel(in_steps(q.float(), 1), in_steps(k.float(), 1), v.float()).to(q.dtype)


def fp8(kernel):
    """One scale for a tensor, as FlashAttention-3's fp8 has it."""

    def coarse(x):
        scale = x.float().abs().max() / 448
        return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale

    return lambda q, k, v: kernel(coarse(q), coarse(k), coarse(v)).to(q.dtype)


def judge(w, device, kernel, declared):
    problem = bench(w, device).problem
    return problem.judge(Case(w, Implementation("mine", lambda _: kernel, approximate=declared), device), kernel)


@pytest.mark.parametrize("seed", [21, 27, 33])
def test_an_unlucky_row_that_a_dozen_scores_decide_is_within_its_budget(seed):
    """Of 4096 rows it errs 2.2 to 2.5 times the root mean square: which was too much with as many directions as scores."""
    w = Workload.parse("b2-h4-s512-d64-bf16")
    problem, kernel = Problem(w, "cpu", seed), int8(RIGHT.build(w))  # a GPU draws others
    verdict = problem.judge(Case(w, Implementation("mine", lambda _: kernel, approximate="int8"), "cpu"), kernel)
    assert 0.6 < verdict.error_over_budget < 0.9


@pytest.mark.parametrize("w", few([*WORKLOADS, *DTYPES]))
@pytest.mark.parametrize(
    ("arithmetic", "declared"), [(int8, "int8"), (int8_by_token, "int8"), (fp8, "fp8"), (int8, True), (fp8, True)]
)
def test_a_right_kernel_passes_in_its_class(suite, w, arithmetic, declared):
    verdict = judge(w, suite.device, arithmetic(RIGHT.build(w)), declared)
    assert not verdict.disqualified
    assert verdict.error_over_budget > 0.05  # an error, and not a budget of everything


@pytest.mark.parametrize("w", few([*WORKLOADS, *DTYPES]))
def test_an_exact_kernel_passes_in_every_class(suite, w):
    for declared in (*PRECISIONS, True):
        assert not judge(w, suite.device, lambda q, k, v: RIGHT.build(w)(q, k, v).to(q.dtype), declared).disqualified


@pytest.mark.parametrize("w", few(w for w in WORKLOADS if w.q_len > 1))  # one query, quantised alone, errs little
@pytest.mark.parametrize(
    ("arithmetic", "declared"),
    [(int8, False), (fp8, False), (fp8, "int8"), (lambda kernel: int8(kernel, largest=7), "int8")],
    ids=["int8 as exact", "fp8 as exact", "fp8 as int8", "int4 as int8"],
)
def test_a_kernel_in_a_class_too_good_for_it_is_rejected(suite, w, arithmetic, declared):
    assert judge(w, suite.device, arithmetic(RIGHT.build(w)), declared).failure


# what quantising hides, on some workload or other: effects of the size of rounding, or of one element of one row
SMALL = {
    *("scale × 1.005", "output × 0.995", "weights truncated", "one value's sign", "softcap's tanh by a fraction"),
    *("sum over keys in the dtype", "denominator in the dtype", "light key tiles skipped"),
    *("K through fp8", "V through fp16", "output through fp16", "products through fp16"),
}
HIDDEN = {
    "int8": SMALL,
    "fp8": {
        *SMALL,
        *("scale × 1.02", "scale × 0.98", "V through fp8", "weights through fp8", "keys after eight equal splits dropped"),
        *("first key dropped", "last key dropped", "key tile visited twice", "causal one key less", "offset one less"),
        *("padding in the denominator", "softcap missing", "softcap doubled", "dropout left on"),
    },
}


@pytest.mark.parametrize("w", few(WORKLOADS, quick=(GQA,)))
@pytest.mark.parametrize(("arithmetic", "declared"), [(int8, "int8"), pytest.param(fp8, "fp8", marks=pytest.mark.slow)])
def test_mutants_die_where_their_effect_exceeds_the_quantisation(suite, w, arithmetic, declared):
    known = bench(w, suite.device)
    survived = set()
    for mutant in MUTANTS:
        if not differs(known, mutant, declared) or (mutant.shows and not mutant.shows(w)):
            continue
        if not judge(w, suite.device, arithmetic(mutant.build(w)), declared).failure:
            survived.add(mutant.name)
            assert own_effect(known, mutant, declared) < 1.5, mutant.name  # the two may partly cancel
    assert survived <= HIDDEN[declared]


def differs(known, mutant, declared):
    """Whether a mutant, in float64, differs from the oracle on what a class is judged on."""
    kernel = mutant.build(known.workload)
    both = zip(known.problem.judged(declared), known.problem.exact(declared), strict=True)
    return any(
        not bool((answer.error(kernel(*(t.double() for t in x))) <= DIFFERS).all()) for x, answer in both for _ in range(2)
    )


def own_effect(known, mutant, declared):
    """A mutant's difference to the oracle, computed in float64, over the budget of a class: the worst row of four calls."""
    kernel = mutant.build(known.workload)
    both = zip(known.problem.judged(declared), known.problem.known(declared), strict=True)
    return max(answer.over_budget(kernel(*(t.double() for t in x))) for x, answer in both for _ in range(2))


@pytest.mark.parametrize("w", few(WORKLOADS))
@pytest.mark.parametrize("declared", ["int8", "fp8"])
def test_the_first_order_error_is_the_size_of_the_error(suite, w, declared):
    few_rows = w.batch * w.heads * w.q_len < 100  # of which single scores decide single rows
    problems = [bench(w, suite.device).problem, *(Problem(w, suite.device, seed) for seed in range(1, 16) if few_rows)]
    for n in range(2):
        errors, sigmas = [], []
        for problem in problems:
            x, known = problem.judged(declared)[n], problem.exact(declared)[n]
            sigma, deciding, plain = approximate._quantised(w, x, known, approximate.ARITHMETIC[declared])
            errors.append((plain - known.out).square().sum())
            sigmas.append(sigma.square().sum())
            assert bool((deciding >= 1).all())
        ratio = float((sum(errors) / sum(sigmas)).sqrt())
        assert 0.75 < ratio < 1.2 if declared == "int8" else 0.5 < ratio < 1  # roundoff / √3 bounds a float's from above


def test_sampled_rows_are_judged_as_all_are(suite, monkeypatch):
    w = Workload.parse("b1-h2kv1-s300-d64-causal-win150-bf16")
    problem = Problem(w, suite.device, 0)
    x = problem.judged(True)[0]
    all_rows = oracle.reference(w, x)
    monkeypatch.setitem(oracle.MAX_PAIRS, suite.device, 1)
    some = oracle.reference(w, x)
    assert some.rows is not None
    for declared in approximate.ARITHMETIC.values():
        full, part = (approximate._quantised(w, x, known, declared) for known in (all_rows, some))
        for one, other in zip(full, part, strict=True):
            torch.testing.assert_close(one[:, :, some.rows], other)


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_fp8_operands_are_scaled_whatever_their_size(suite, factor):
    problem = bench(GQA, suite.device).problem
    x, known = problem.judged(True)[0], problem.exact(True)[0]
    resized = type(x)(x.q.double() * factor, x.k.double() / factor, x.v.double())
    for one, other in zip(
        approximate._quantised(GQA, x, known, approximate.ARITHMETIC["fp8"]),
        approximate._quantised(GQA, resized, known, approximate.ARITHMETIC["fp8"]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_true_is_the_loosest_class(suite):
    problem = bench(GQA, suite.device).problem
    references = {declared: problem.known(declared) for declared in (*PRECISIONS, True)} | {False: problem.exact(True)}
    for n in range(2):
        exact, eight, float8, loosest = (references[declared][n] for declared in (False, *PRECISIONS, True))
        assert torch.equal(loosest.budget, torch.maximum(eight.budget, float8.budget))
        assert bool((eight.budget > exact.budget).all())
        assert loosest.drift == max(eight.drift, float8.drift) > exact.drift


def test_two_outputs_may_be_apart_by_both_budgets():
    out = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    one, other = (Reference(None, out, torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), budget)) for budget in (0.3, 0.1))
    assert one.apart(out * 1.2, out, other) == pytest.approx(0.5)


def test_a_class_is_one_that_there_is():
    assert tuple(approximate.ARITHMETIC) == PRECISIONS
    with pytest.raises(ValueError, match=r"^implementation 'mine': approximate is 'int4', give True, int8, fp8 or False$"):
        attention("mine", approximate="int4")


def test_sdpa_is_held_to_its_own_class(suite):
    """The judge's comparison with SDPA allows the sum of the kernel's budget and SDPA's exact one."""
    w = GQA
    problem = bench(w, suite.device).problem
    verdict = judge(w, suite.device, int8(RIGHT.build(w)), "int8")
    exact = judge(w, suite.device, lambda q, k, v: RIGHT.build(w)(q, k, v).to(q.dtype), False)
    assert verdict.sdpa_error_over_budget == exact.sdpa_error_over_budget  # SDPA's error does not depend on who asks
    assert problem.sdpa is not None
    assert 0 < verdict.sdpa_over_budget <= 1
    assert CAPPED.softcap
    assert judge(CAPPED, suite.device, int8(RIGHT.build(CAPPED)), "int8").sdpa_over_budget is None
