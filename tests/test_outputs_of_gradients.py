"""Gradients that timed rounds put out: which one was wrong, and when."""

import re
from functools import partial

import pytest
import torch
from test_outputs import W, failure_of, noise, right, unrepeatable

from attn_impls.harness import gradients
from attn_impls.harness.judge import Problem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def problem():
    return Problem(W, "cpu", 0)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_left_over_from_the_round_before_is_found(problem, name):
    before = []

    def stale(gradient, n):
        before.append(gradient.clone())
        if n == 5:
            gradient.copy_(before[-2])

    def kernel(q, k, v, n):
        inputs = {"q": q, "k": k, "v": v}
        inputs[name] = Spoilt.apply(inputs[name], partial(stale, n=n))
        return right(*inputs.values())

    assert "in 1 of 9 rounds, warm-up included (first: round 5): " in failure_of(problem, kernel, 9, "backward")


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("direction", ["backward", "forward+backward"])
def test_a_gradient_that_is_wrong_once_is_named(problem, direction, layout, name):
    said = failure_of(problem, once_wrong(name, 11), 20, direction, layout)
    start = "differs from the float64 oracle in 1 of 20 rounds, warm-up included (first: round 11): "
    assert re.fullmatch(re.escape(start) + rf"its worst row of d{name} errs \S+ × the budget", said)


@pytest.mark.parametrize("direction", ["backward", "forward+backward"])
def test_right_gradients_pass(problem, direction):
    assert failure_of(problem, lambda q, k, v, _: right(q, k, v), 20, direction) == ""
    assert failure_of(problem, unrepeatable, 20, direction) == ""


class Spoilt(torch.autograd.Function):
    """A tensor whose gradient is spoilt."""

    @staticmethod
    def forward(ctx, x, spoil):
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        ctx.spoil(gradient)
        return gradient, None


def another_row(gradient):
    gradient[0, 1, 7] = gradient[0, 1, 8]


def once_wrong(name, call, spoil=another_row):
    """A kernel whose gradient of one input is spoilt in one call."""

    def kernel(q, k, v, n):
        inputs = {"q": q, "k": k, "v": v}
        if n == call:
            inputs[name] = Spoilt.apply(inputs[name], spoil)
        return right(*inputs.values())

    return kernel


def test_noise_in_a_gradient_row_near_zero_hides_no_wrong_row(problem):
    def noisy(gradient, n):  # the first query sees one key, so that its scores move nothing
        gradient[0, :, 0] = 1e-8 * torch.randn(gradient.shape[-1], generator=noise) if n > 1 else 1e-12

    wrong = once_wrong("q", 18)

    def kernel(q, k, v, n):
        return wrong(Spoilt.apply(q, partial(noisy, n=n)), k, v, n)

    said = failure_of(problem, kernel, 30, "backward")
    assert "in at least 1 of 30 rounds, warm-up included (first: round 18; " in said


def test_gradients_are_judged_by_the_heads_that_are_known(monkeypatch):
    monkeypatch.setitem(gradients.MAX_PAIRS, "cpu", W.group * W.q_len * W.kv_len)
    problem = Problem(W, "cpu", 0)
    assert problem.gradient_heads == {"q": [0, 1], "k": [0], "v": [0]}
    assert "worst row of dq" in failure_of(problem, once_wrong("q", 5), 9, "backward")
    assert failure_of(problem, once_wrong("k", 5), 9, "backward") == ""  # of the other head
    said = failure_of(problem, once_wrong("k", 5, lambda gradient: gradient[0, 1].fill_(torch.nan)), 9, "backward")
    assert said.endswith(f"returned NaN in {W.kv_len} of {W.kv_heads * W.kv_len} rows of dk")
