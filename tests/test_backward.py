"""Backward passes as calls to time: who has none, their forward passes, their work, and the directions asked for."""

import math

import pytest
import torch
from fake_gpu import FIRST_SPIN, KERNEL, FakeGpu

from attn_impls import Unsupported, Workload
from attn_impls.harness import backward, gradients
from attn_impls.harness.backward_steps import broken
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.clock import DeviceClock, HostClock, Subject
from attn_impls.harness.inputs import plain
from attn_impls.harness.mutation import WORKLOADS
from attn_impls.registry import Implementation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda q, _k, _v: q.detach() * 1.0, "forward only: its output carries no gradient"),
        (lambda q, _k, _v: NoBackward.apply(q), "no backward here: NotImplementedError: not written yet"),
    ],
)
def test_forward_only_is_a_limit(kernel, words):
    w = WORKLOADS[3]
    case = Case(w, Implementation("mine", lambda _: kernel), "cpu", "backward")
    x, dout = plain(w, "cpu", 0), gradients.upstream(w, "cpu", 0)
    with pytest.raises(Unsupported, match=words):
        backward.gradients(case, kernel, x, dout, first=True)
    with pytest.raises(CaseFailed, match=f"not a later one: {words}"):
        backward.gradients(case, kernel, x, dout)


def test_xformers_reasons_are_told_without_its_inputs():
    said = """No operator found for `memory_efficient_attention_backward` with inputs:
     query       : shape=(1, 8192, 8, 4, 128) (torch.bfloat16)
     attn_bias   : <class 'NoneType'>
`cutlassB-pt` is not supported because:
    operator wasn't built - see `python -m xformers.info` for more info
    operator does not support BMGHK format
`fa2B@2.5.7-pt` is not supported because:
    operator does not support BMGHK format"""
    wanted = "operator wasn't built - see `python -m xformers.info` for more info; operator does not support BMGHK format"
    assert backward.forward_only(NotImplementedError(said)) == f"no backward here: {wanted}"


def test_a_backward_pass_that_raises_fails_the_case():
    w = WORKLOADS[3]
    case = Case(w, Implementation("mine", lambda _: Raises.apply), "cpu", "backward")
    with pytest.raises(CaseFailed, match="ZeroDivisionError"):
        backward.gradients(case, Raises.apply, plain(w, "cpu", 0), gradients.upstream(w, "cpu", 0))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):  # noqa: ARG004
        return q.clone()

    @staticmethod
    def backward(ctx, *douts):
        raise NotImplementedError("not written yet")


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):  # noqa: ARG004
        return q.clone()

    @staticmethod
    def backward(ctx, *douts):  # noqa: ARG004
        raise ZeroDivisionError


class Counted:
    """A right kernel that counts its forward passes."""

    def __init__(self, w):
        self.kernel, self.calls = broken()(w), 0

    def __call__(self, *x):
        self.calls += 1
        return self.kernel(*x)


def test_gradients_alone_use_up_forward_passes_made_before():
    w = WORKLOADS[3]
    kernel, x, dout = Counted(w), plain(w, "cpu", 0), gradients.upstream(w, "cpu", 0)
    call, now = backward.Backward(kernel, x, dout), [0.0]

    def host_time():
        now[0] += kernel.calls  # a forward pass inside the bracket would show
        return float(kernel.calls)

    clock, subject = HostClock(host_time), Subject(call, loops=3)
    clock.prepare(subject)
    assert kernel.calls == 3
    assert clock.sample(subject).seconds == 0.0
    assert (kernel.calls, len(call.outs)) == (3, 0)


def test_a_round_measured_again_gets_forward_passes_of_its_own(monkeypatch):
    w, gpu = WORKLOADS[3], FakeGpu()
    kernel = Counted(w)
    call = backward.Backward(kernel, plain(w, "cpu", 0), gradients.upstream(w, "cpu", 0))
    slow = backward.Backward.__call__

    def late(self):
        gpu.work(2 * FIRST_SPIN)
        gpu.enqueue(KERNEL)
        return slow(self)

    monkeypatch.setattr(backward.Backward, "__call__", late)
    clock, subject = DeviceClock(gpu), Subject(call)
    clock.prepare(subject)
    found = clock.sample(subject)
    assert clock.retries == 1
    assert kernel.calls == 2
    assert found.seconds == pytest.approx(KERNEL, rel=1e-9)


def test_flops_and_bytes_of_both_passes_add_up():
    for w in WORKLOADS:
        for count in (w.flops, w.bytes):
            assert count("forward+backward") == count("forward") + count("backward")


ONE_WRONG = """
from attn_impls import attention
from attn_impls.harness.backward_steps import broken

@attention("careless")
def careless(w):
    return broken(delta=lambda _w, delta: 0 * delta)(w)

@attention("forwards", backward=False)
def forwards(w):
    return broken()(w)
"""


@pytest.mark.slow
def test_directions_from_end_to_end(run_suite, suite_copy):
    folder = suite_copy({"mine.py": ONE_WRONG})
    options = ("--workload=b1-h2-s32-d16-causal-fp32", "--rounds=7", "--warmup-rounds=1", "--benchmark-only")
    run = run_suite(
        "--impl=./mine.py,sdpa,handcrafted",
        "--direction=forward,backward,forward+backward",
        *options,
        "--benchmark-json=run.json",
        cwd=folder,
    )
    assert run.code == 1
    cases = set(run.names)
    assert {name for name in cases if "careless" in name} == {"test_forward[b1-h2-s32-d16-causal-fp32-careless]"}
    assert {name for name in cases if "forwards" in name} == {"test_forward[b1-h2-s32-d16-causal-fp32-forwards]"}
    assert sum("sdpa" in name for name in cases) == sum("handcrafted" in name for name in cases) == 3
    assert "careless differs in d" in run.out
    assert "b1-h2-s32-d16-causal-fp32 backward" in run.table
    assert "b1-h2-s32-d16-causal-fp32 forward+backward" in run.table
    assert any(line.split() == ["forwards", "forward", "only"] for line in run.table.splitlines())
    info = run.names["test_backward[b1-h2-s32-d16-causal-fp32-handcrafted]"]["extra_info"]
    w = Workload.parse("b1-h2-s32-d16-causal-fp32")
    assert (info["direction"], info["flops"], info["bytes"]) == ("backward", w.flops("backward"), w.bytes("backward"))
    assert info["vs_sdpa"] > 0
    assert math.isclose(info["error_over_budget"], max(info[f"{name}_error_over_budget"] for name in ("dq", "dk", "dv")))


def test_an_unknown_direction_is_a_usage_error(run_suite):
    run = run_suite("--direction", "backwards")
    assert run.code == 4
    assert run.errors == ["ERROR: --direction 'backwards': give one of forward, backward, forward+backward"]
