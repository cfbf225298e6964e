"""Kernels that write where they should not: they are blamed, and not who comes after them."""

import pytest
import torch

from attn_impls import Workload
from attn_impls.harness.backward_steps import broken
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.intact import Marks
from attn_impls.harness.judge import Problem
from attn_impls.registry import Implementation

pytestmark = pytest.mark.usefixtures("one_thread")

W = Workload.parse("b1-h4kv2-s33-d64-causal-bf16")
right = broken()(W)


def case_of(direction="forward"):
    return Case(W, Implementation("mine", lambda _: right), "cpu", direction)


def scribbling(holder, fails=False, on_call=2):
    """A right kernel that zeroes the last values of a tensor of somebody else's."""
    calls = 0

    def kernel(q, k, v):
        nonlocal calls
        calls += 1
        if calls == on_call:
            holder().flatten()[-3:] = 0
            if fails:
                raise RuntimeError("boom")
        return right(q, k, v)

    return kernel


HOLDERS = {
    "needles": lambda problem: problem.needles.k,
    "plain": lambda problem: problem.plain.v,
    "references": lambda problem: problem.references[1].budget,
    "sdpa": lambda problem: problem.sdpa[0],
}
TRAINED = {
    "trained": lambda problem: problem.trained[0].q,
    "douts": lambda problem: problem.douts[1],
}


@pytest.mark.parametrize("name", HOLDERS)
def test_outputs(name):
    problem = Problem(W, "cpu", 0)
    verdict = problem.judge(case_of(), scribbling(lambda: HOLDERS[name](problem)))
    assert verdict.failure == verdict.disqualified == f"wrote outside its tensors: the judge's own {name} changed"
    assert not problem.judge(case_of(), right).disqualified


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    problem = Problem(W, "cpu", 0)
    verdict = problem.judge_gradients(case_of("backward"), scribbling(lambda: TRAINED[name](problem)))
    assert verdict.failure == f"wrote outside its tensors: the judge's own {name} changed"
    assert not problem.judge_gradients(case_of("backward"), right).disqualified


def test_a_kernel_that_raises_too():
    problem = Problem(W, "cpu", 0)
    with pytest.raises(CaseFailed, match="boom"):
        problem.judge(case_of(), scribbling(lambda: problem.needles.k, fails=True))
    assert not problem.judge(case_of(), right).disqualified


def test_in_its_first_call():
    problem = Problem(W, "cpu", 0)
    kernel = scribbling(lambda: problem.plain.k, on_call=1)
    with pytest.raises(CaseFailed, match=r"mine wrote outside its tensors: the judge's own plain changed in its first call"):
        problem.build(Case(W, Implementation("mine", lambda _: kernel), "cpu"))
    assert not problem.judge(case_of(), right).disqualified


def test_while_it_is_timed():
    problem = Problem(W, "cpu", 0)
    assert not problem.judge(case_of(), right).disqualified
    call = problem.call(case_of(), scribbling(lambda: problem.needles.q, on_call=1))
    call()
    assert problem.changed("bhsd") == "wrote outside its tensors: the judge's own needles changed"
    assert problem.changed("bhsd") == ""


def test_marks():
    marks = Marks()
    one, of_nan, strided = torch.ones(3), torch.full((2, 2), float("nan"), dtype=torch.bfloat16), torch.ones(4, 4).T[1:]
    holders = {"one": one, "several": ({"a": [of_nan]}, None), "strided": strided}
    marks.add(holders)
    assert marks.broken() == ""
    strided[2, 3] = 2
    assert marks.broken() == "strided"
    marks.add(holders)  # what is marked stays so
    assert marks.broken() == "strided"
    of_nan[1, 1] = 0
    assert marks.broken() == "several"
    marks.add({"later": one + 1})
    one[0] = 5
    assert marks.broken() == "one"
