"""Kernels that write where they should not: they are blamed, and not who comes after them."""

import types

import pytest
import torch

from attn_impls import Workload
from attn_impls.harness import probes, trial
from attn_impls.harness.backward_steps import broken
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.intact import Marks
from attn_impls.harness.judge import Problem
from attn_impls.harness.spread import Spreads
from attn_impls.registry import Implementation

pytestmark = pytest.mark.usefixtures("one_thread")

W = Workload.parse("b1-h4kv2-s33-d64-causal-bf16")
right = broken()(W)


def case_of(direction="forward", kernel=right, **options):
    return Case(W, Implementation("mine", lambda _: kernel, **options), "cpu", direction)


def next_one(problem, direction="forward"):
    """What is said of a right kernel that comes next, as a session treats it."""
    case = case_of(direction)
    kernel, _, out = problem.build(case)
    if direction == "forward":
        return problem.judge(case, kernel, out).disqualified
    return problem.judge_gradients(case, kernel, problem.first_pass(case, kernel)).disqualified


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
    assert verdict.failure == verdict.disqualified == f"wrote outside its tensors: the judge's own changed ({name})"
    assert not next_one(problem)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    problem = Problem(W, "cpu", 0)
    verdict = problem.judge_gradients(case_of("backward"), scribbling(lambda: TRAINED[name](problem)))
    assert verdict.failure == f"wrote outside its tensors: the judge's own changed ({name})"
    assert not next_one(problem, "backward")


@pytest.mark.parametrize("on_call", [1, 2, 3])
def test_one_that_raises_leaves_nothing_to_the_next(on_call):
    problem = Problem(W, "cpu", 0)
    assert not next_one(problem)
    case = case_of(kernel=scribbling(lambda: problem.needles.k, fails=True, on_call=on_call))
    with pytest.raises(CaseFailed, match="boom"):
        problem.judge(case, problem.build(case).kernel)
    assert not next_one(problem)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_in_its_first_call(direction):
    problem = Problem(W, "cpu", 0)
    assert not next_one(problem, direction)
    case = case_of(direction, kernel=scribbling(lambda: problem.plain.k, on_call=1 if direction == "forward" else 2))
    words = r"mine wrote outside its tensors: the judge's own changed \(plain\) in its first (call|backward pass)"
    with pytest.raises(CaseFailed, match=words):
        problem.first_pass(case, problem.build(case).kernel)
    assert not next_one(problem, direction)


def test_while_it_is_timed():
    problem = Problem(W, "cpu", 0)
    assert not next_one(problem)
    problem.call(case_of(), scribbling(lambda: problem.needles.q, on_call=1))()
    assert problem.changed("bhsd") == "wrote outside its tensors: the judge's own changed (needles)"
    assert problem.changed("bhsd") == ""
    problem.native("bhsd").v[0] = 0
    assert problem.changed("bshd") == "wrote outside its tensors: the judge's own changed (inputs, bhsd)"
    assert problem.changed("bhsd") == ""


def test_budgets_of_the_approximate():
    problem = Problem(W, "cpu", 0)
    case = case_of(approximate="int8")
    assert not problem.judge(case, right).disqualified
    verdict = problem.judge(case, scribbling(lambda: problem.known("int8")[0].budget))
    assert verdict.failure == "wrote outside its tensors: the judge's own changed (budgets of int8)"
    assert problem.remade == 1
    assert not problem.judge(case, right).disqualified


def test_ranks_keep_no_answers_of_what_was_damaged(monkeypatch):
    problem, spreads = Problem(W, "cpu", 0), Spreads(types.SimpleNamespace(ranks="ranks"))
    monkeypatch.setattr(spreads, "plan", lambda *_: None)

    def answers():
        return spreads.trial(case_of(), None, problem, alone=False).answers

    answers()["gradients"] = problem.plain
    problem.mark()
    assert "gradients" in answers()
    problem.plain.q[0] = 0
    assert answers() == {}
    assert problem.plain.q[0].any()


def test_answers_of_probes():
    def scribbler(w):
        trial.QUESTIONS.of(w, "cpu").dout.zero_()
        return broken()(w)

    first = probes.probe(Implementation("scribbler", scribbler, backward=False), "cpu")
    assert first["layout"] == "wrong: wrote outside its tensors, on the answers of probes"
    answers = probes.probe(Implementation("mine", lambda w: broken()(w)), "cpu")
    assert {text.partition(":")[0] for text in answers.values()} <= {"ok", "unsupported"}


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
