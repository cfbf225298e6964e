"""First calls: what they alone get wrong, and the inputs that they change; and what later calls alone get wrong."""

import math
from functools import partial

import pytest
import torch
from test_gradients import RIGHT, case_of
from test_judge import W, good, good_bshd

from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.judge import Problem
from attn_impls.registry import Implementation
from attn_impls.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def problem_of_w():
    return Problem(W, "cpu", 0)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_first_call_that_alone_is_wrong_is_told(problem_of_w, layout):
    case = Case(W, Implementation("mine", lambda _: None, layout=layout), "cpu")
    right = good if layout == "bhsd" else good_bshd
    native = problem_of_w.plain.as_layout(layout)
    first = right(*native)
    assert problem_of_w.judge(case, right, first).failure == ""
    first = first.clone()
    first[0, 3, 3] = 0
    said = problem_of_w.judge(case, right, first).failure
    assert said.startswith("differs from the float64 oracle in its first call alone: its worst row errs ")
    first[0, 3, 3, 0] = math.nan
    said = problem_of_w.judge(case, right, first).disqualified
    assert said == f"differs from the float64 oracle in its first call alone: returned NaN in 1 of {2 * 4 * 100} rows"
    assert "its first call" not in problem_of_w.judge(case, lambda q, k, v: right(q, k, v) * 0, first).failure


def test_a_first_backward_pass_that_alone_is_wrong_is_told(problem_of_w):
    case = Case(W, Implementation("mine", lambda _: good), "cpu", "backward")
    first = problem_of_w.first_pass(case, good)
    assert problem_of_w.judge_gradients(case, good, first).failure == ""
    out = first.out.clone()
    out[1, 3, 7] = 0
    said = problem_of_w.judge_gradients(case, good, first._replace(out=out)).failure
    assert said.startswith("differs from the float64 oracle in its first training pass alone: its worst row of the output errs ")
    first.gradients.v[1, 1, 4] = 0
    said = problem_of_w.judge_gradients(case, good, first).failure
    assert said.startswith("differs from the float64 oracle in its first backward pass alone: its worst row of dv errs ")


def test_what_a_first_call_or_pass_changes_is_told(problem_of_w):
    def changing(name, q, k, v):
        {"q": q, "k": k, "v": v}[name].zero_()
        return good(q, k, v)

    for name in "qkv":
        mine = Implementation("mine", lambda _, name=name: partial(changing, name))
        with pytest.raises(CaseFailed, match=f"^mine changed its input {name} in its first call$"):
            problem_of_w.build(Case(W, mine, "cpu"))

    def vandal(q, k, v):
        out = good(q, k, v)
        out.register_hook(lambda dout: dout.zero_())
        return out

    case = Case(W, Implementation("mine", lambda _: vandal), "cpu", "backward")
    with pytest.raises(CaseFailed, match=r"^mine changed dout, its upstream gradient, in its first backward pass$"):
        problem_of_w.first_pass(case, vandal)


@pytest.mark.parametrize("number", [2, 3, 12, 24, 40])
def test_a_call_after_many_that_is_wrong_shows_on_a_tiny_workload(number):
    w = Workload.parse("b2-h4kv2-q3kv7-d64-causal-fp32")
    calls = 0

    def tiring(*x):
        nonlocal calls
        calls += 1
        return RIGHT(w)(*x) * (1 if calls < number else 0.5)

    assert "its worst row errs" in Problem(w, "cpu", 0).judge(case_of(lambda _: tiring, w), tiring).failure


def test_a_call_without_gradients_that_is_wrong_is_told(problem_of_w):
    def careless(*x):
        return good(*x) if torch.is_grad_enabled() else good(*x) * 0.5

    case = Case(W, Implementation("mine", lambda _: careless), "cpu")
    assert "its worst row errs" in problem_of_w.judge(case, careless).failure
    compiled = Case(W, Implementation("mine", lambda _: careless, compiles="seconds"), "cpu")  # it would compile anew for that
    assert problem_of_w.judge(compiled, careless).failure == ""
