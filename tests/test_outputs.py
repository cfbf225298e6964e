"""What timed rounds put out: kernels that pass every check before the rounds, and are wrong in some of them."""

import gc
import re

import pytest
import torch
from fake_gpu import FakeGpu
from fakes import Rounds

from attn_impls import Workload
from attn_impls.harness import measure
from attn_impls.harness.backward_steps import broken
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.clock import DeviceClock, HostClock
from attn_impls.harness.judge import Problem
from attn_impls.harness.outputs import MOST_JUDGED, Outputs
from attn_impls.registry import Implementation

pytestmark = pytest.mark.usefixtures("one_thread")

W = Workload.parse("b1-h4kv2-s33-d16-causal-fp32")
ROWS = W.heads * W.q_len
PLANNED = 2  # rounds before the first warm-up


@pytest.fixture(scope="module")
def problem():
    return Problem(W, "cpu", 0)


def failure_of(problem, kernel, rounds=100, direction="forward", layout="bhsd", clock=None, approximate=False):
    """What is said of a kernel (q, k, v, number of the call, from 1 after those that plan) after some rounds, "" if nothing."""
    calls = iter(range(1, 10**6))

    def counted(*tensors):
        q, k, v = (t.transpose(1, 2) for t in tensors) if layout == "bshd" else tensors
        out = kernel(q, k, v, next(calls) - PLANNED)
        return out.transpose(1, 2) if layout == "bshd" else out

    implementation = Implementation("mine", lambda _: counted, layout=layout, approximate=approximate)
    case = Case(problem.workload, implementation, "cpu", direction)
    call = problem.call(case, counted)
    outputs = Outputs(case, problem, call)
    with problem.handing_out(layout):
        measure.run(Rounds(), clock or DeviceClock(FakeGpu()), call, None, rounds, 0, outputs.see, outputs.turn)
        said = outputs.failure()
    assert problem.changed(layout) == ""
    return said


right = broken()(W)
noise = torch.Generator().manual_seed(0)


def unrepeatable(q, k, v, _=0):
    """A right kernel that never gives the same bits: some elements are off by one unit in the last place."""
    out = right(q, k, v)
    return torch.where(torch.rand(out.shape, generator=noise) < 0.1, out.nextafter(torch.tensor(torch.inf)), out)


def spoilt(wrong, kernel=lambda q, k, v, _: right(q, k, v), spoil=lambda out: out * 0):
    """A kernel whose output is spoilt in the rounds that `wrong` says."""
    return lambda q, k, v, n: spoil(kernel(q, k, v, n)) if wrong(n) else kernel(q, k, v, n)


def one_row(out):
    out = out.clone()
    out[0, 3, 7] = out[0, 3, 8]
    return out


def one_nan(out):
    out = out.clone()
    out[0, 3, 7, 1] = torch.nan
    return out


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "kernel",
    [
        lambda q, k, v, _: right(q, k, v),
        unrepeatable,
        spoilt(lambda n: n % 2, spoil=lambda out: out.mT.contiguous().mT),
    ],
    ids=["repeats itself", "does not", "in other memory"],
)
def test_a_right_kernel_passes(problem, kernel, layout):
    assert failure_of(problem, kernel, layout=layout) == ""


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_two_wrong_rounds_of_a_hundred_are_told_with_the_first_and_the_worst_row(problem, layout):
    said = failure_of(problem, spoilt(lambda n: n in (41, 87), spoil=one_row), layout=layout)
    start = "differs from the float64 oracle in 2 of 100 rounds, warm-up included (first: round 41): its worst row errs "
    assert said.startswith(start)
    assert float(said.removeprefix(start).removesuffix(" × the budget")) > 100


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
def test_rows_of_any_length_and_order_in_memory_are_compared(monkeypatch, layout, across):
    w = Workload.parse("b1-h4-s33-d5-bf16")
    problem, kernel, odd = Problem(w, "cpu", 0), broken()(w), {41, 87}

    def call(q, k, v, n):
        out = kernel(q, k, v) if n not in odd else one_row(kernel(q, k, v))
        return out.mT.contiguous().mT if across else out

    judged, judge = [], Problem.timed_error
    monkeypatch.setattr(Problem, "timed_error", lambda *args: judged.append(args) or judge(*args))
    assert "in 2 of 100 rounds, warm-up included (first: round 41): " in failure_of(problem, call, layout=layout)
    assert len(judged) == 3
    odd.clear()
    assert failure_of(problem, call, layout=layout) == ""


def test_rounds_that_deviate_and_are_not_judged_are_counted_apart(problem):
    said = failure_of(problem, spoilt(lambda n: n % 7 == 0))
    assert "in at least 10 of 100 rounds, warm-up included (first: round 7; 4 more that deviate were not judged): " in said
    said = failure_of(problem, spoilt(lambda n: n % 7 == 0), rounds=7 * MOST_JUDGED)
    assert f"in {MOST_JUDGED} of {7 * MOST_JUDGED} rounds, warm-up included (first: round 7): " in said


@pytest.mark.parametrize("spoil", [one_row, one_nan, torch.zeros_like])
@pytest.mark.parametrize("round_", [5, 95])
def test_one_wrong_round_among_many_that_deviate_is_found(problem, round_, spoil):
    said = failure_of(problem, spoilt(lambda n: n == round_, unrepeatable, spoil))
    assert re.search(rf"in at least 1 of 100 rounds, warm-up included \(first: round {round_}; \d+ more that deviate", said)


def test_few_of_many_deviating_rounds_are_judged(problem, monkeypatch):
    judged, judge = [], Problem.timed_error
    monkeypatch.setattr(Problem, "timed_error", lambda *args: judged.append(args) or judge(*args))
    assert failure_of(problem, lambda q, k, v, _: right(q, k, v)) == ""
    assert len(judged) == 1
    assert failure_of(problem, unrepeatable, rounds=400) == ""
    assert MOST_JUDGED + 2 <= len(judged) <= MOST_JUDGED + 20


def test_a_wrong_first_round_counts_with_all_that_are_like_it(problem):
    assert "in 1 of 9 rounds, warm-up included (first: round 1): " in failure_of(problem, spoilt(lambda n: n == 1), rounds=9)
    assert "in 9 of 9 rounds, warm-up included (first: round 1): " in failure_of(problem, spoilt(lambda n: n > 0), rounds=9)
    assert "in 7 of 9 rounds, warm-up included (first: round 1): " in failure_of(problem, spoilt(lambda n: n % 4), rounds=9)


def test_nan_is_told_as_such(problem):
    said = failure_of(problem, spoilt(lambda n: n == 17, spoil=one_nan))
    assert said.endswith(f"in 1 of 100 rounds, warm-up included (first: round 17): returned NaN in 1 of {ROWS} rows")
    said = failure_of(problem, spoilt(lambda n: n > 0, spoil=one_nan), rounds=9)
    assert f"in 9 of 9 rounds, warm-up included (first: round 1): returned NaN in 1 of {ROWS} rows" in said


@pytest.mark.parametrize(
    ("out", "words"),
    [(None, "returned NoneType, not a tensor"), (torch.zeros(1), r"returned shape \(1,\), expected \(1, 4, 33, 16\)")],
)
def test_what_is_no_output_fails_in_any_round(problem, out, words):
    with pytest.raises(CaseFailed, match=words):
        failure_of(problem, lambda q, k, v, n: out if n == 50 else right(q, k, v))


@pytest.mark.parametrize("wrong", [None, 1, 6])
def test_one_buffer_for_all_outputs_is_seen_through(problem, wrong):
    buffer = torch.empty(W.shapes()["out"])
    said = failure_of(problem, lambda q, k, v, n: buffer.copy_(right(q, k, v) * (n != wrong)), rounds=9)
    assert said == "" if wrong is None else f"in 1 of 9 rounds, warm-up included (first: round {wrong}): " in said


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("kept", ["q", "k", "v"])
def test_an_input_kept_from_the_round_before_is_found(problem, kept, direction, layout):
    of_last, left = {}, []

    def kernel(q, k, v, n):
        tensors = {"q": q, "k": k, "v": v}
        now, of_last[kept] = tensors[kept], tensors[kept].detach().clone()
        if n == 6:
            tensors[kept] = now - now.detach() + left[0]
        left[:] = [of_last[kept]]
        return right(*tensors.values())

    assert "in 1 of 9 rounds, warm-up included (first: round 6): " in failure_of(problem, kernel, 9, direction, layout)


def test_an_output_left_over_from_the_round_before_is_found(problem):
    outs = []

    def kernel(q, k, v, n):
        outs.append(right(q, k, v))
        return outs[-2] if n in (4, 7) else outs[-1]

    assert "in 2 of 9 rounds, warm-up included (first: round 4): " in failure_of(problem, kernel, 9)


def test_rows_that_see_no_key_are_the_same_in_every_round(monkeypatch):
    w = Workload.parse("b1-h2-q9kv4-d8-causal-fp32")  # zeros, of either sign
    judged, judge = [], Problem.timed_error
    monkeypatch.setattr(Problem, "timed_error", lambda *args: judged.append(args) or judge(*args))
    assert failure_of(Problem(w, "cpu", 0), lambda q, k, v, _: broken()(w)(q, k, v), 9) == ""
    assert len(judged) == 1


def test_an_approximate_kernel_has_its_class_s_budget(problem):
    def coarse(q, k, v, n):
        out = right(q, k, v)
        return out * (1 + 1e-3 * (torch.arange(out.shape[-1]) % 2 * 2 - 1)) if n == 9 else out

    assert "in 1 of 100 rounds" in failure_of(problem, coarse)
    assert failure_of(problem, coarse, approximate="int8") == ""


def test_the_last_output_of_a_cpu_round_is_the_one_that_is_checked(problem):
    now = [0.0]

    def call(q, k, v, n):
        now[0] += 2.0**-13  # a round makes nine calls, after ten that plan
        return right(q, k, v) * (n not in wrong)

    wrong = {10 - PLANNED + n for n in (1, 8, 10, 17)}
    assert failure_of(problem, call, 20, clock=HostClock(lambda: now[0])) == ""
    wrong.add(10 - PLANNED + 18)
    said = failure_of(problem, call, 20, clock=HostClock(lambda: now[0]))
    assert "in 1 of 20 rounds, warm-up included (first: round 2): " in said


def test_one_copy_is_held_beside_the_last_output_and_none_in_the_end(problem):
    shape, counts = torch.Size(W.shapes()["out"]), []

    def tensors():
        return sum(isinstance(one, torch.Tensor) and one.shape == shape for one in gc.get_objects())

    def kernel(q, k, v):
        counts.append(tensors())
        return unrepeatable(q, k, v)

    case = Case(W, Implementation("mine", lambda _: kernel), "cpu")
    call = problem.call(case, kernel)
    outputs = Outputs(case, problem, call)
    problem.timed_error(case, [call()])  # makes the references
    counts.clear()
    gc.collect()
    gc.freeze()  # what is there already need not be looked through each time
    before = tensors()
    measure.run(Rounds(), DeviceClock(FakeGpu()), call, None, 28, 0, outputs.see, outputs.turn)
    assert outputs.failure() == ""
    assert tensors() == before
    assert counts == 3 * [before] + 27 * [before + 1]  # nothing is kept of the rounds that plan
