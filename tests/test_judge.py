"""Problem.judge: right kernels pass; wrong, stateful and meddling ones are rejected, each with its reason."""

import math
from functools import partial

import pytest
import tf32
import torch
from plain_attention import attend

from attn_impls import Unsupported, Workload
from attn_impls.harness import inputs
from attn_impls.harness.case import Case, CaseFailed
from attn_impls.harness.judge import Problem
from attn_impls.registry import REGISTRY, Implementation

pytestmark = pytest.mark.usefixtures("one_thread")

W = Workload.parse("b2-h4kv2-s100-d32-causal-bf16")


@pytest.fixture(scope="module")
def problem_of_w():
    return Problem(W, "cpu", 0)


def judged(problem, kernel, layout: str = "bhsd"):
    return problem.judge(Case(problem.workload, Implementation("mine", lambda _: kernel, layout=layout), "cpu"), kernel)


def good(q, k, v):
    return attend(W, inputs.Inputs(q, k, v)).to(q.dtype)


def good_bshd(q, k, v):
    return good(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(("kernel", "layout"), [(good, "bhsd"), (good_bshd, "bshd")])
def test_a_right_kernel_passes(problem_of_w, kernel, layout):
    verdict = judged(problem_of_w, kernel, layout)
    assert (verdict.failure, verdict.sdpa_failure, verdict.complaint) == ("", "", "")
    assert 0 < verdict.rms_over_budget < verdict.error_over_budget <= 1
    assert verdict.sdpa_over_budget <= 1
    assert verdict.sdpa_error_over_budget <= 1
    assert verdict.bitwise_repeatable


@pytest.mark.parametrize(
    "text",
    [
        "b2-h4-s32-d64-fp32",
        "b2-h3kv1-s45-d64-causal-fp32",
        "b1-h4kv2-q9kv150-d96v64-causal-win100-fp32",
        "b1-h2-q50kv25-d256-causal-fp32",
        "b1-h4-s64-d4-fp32",
    ],
)
def test_float32_on_tensor_cores_is_three_products_of_tf32_not_one(text):
    w = Workload.parse(text)
    problem = Problem(w, "cpu", 0)
    assert judged(problem, partial(tf32.attend, w)).error_over_budget < 0.8
    assert judged(problem, partial(tf32.attend, w, passes=1)).error_over_budget > 100


class Stateful:
    """Kernels that go wrong only when called again."""

    def __init__(self):
        self.calls, self.outs, self.packed = 0, [], {}

    def previous(self, *x):
        self.outs.append(good(*x))
        return self.outs[max(0, len(self.outs) - 2)]

    def first(self, *x):
        self.outs.append(good(*x))
        return self.outs[0]

    def one_buffer(self, *x):
        self.outs = self.outs or [torch.empty_like(x[0])]
        return self.outs[0].copy_(good(*x))

    def one_buffer_late(self, *x):
        self.calls += 1
        return self.one_buffer(*x).mul_(0 if self.calls % 2 else 1)

    def every_other(self, *x):
        self.calls += 1
        return good(*x) * (self.calls % 2)

    def last_only(self, *x):
        self.calls += 1
        return good(*x) * (1 if self.calls == 4 else 0)

    def written_once(self, *x):
        """The second time, returns memory that nothing was written to; without poison it would hold the right answer."""
        self.calls += 1
        if self.calls % 2 == 0:
            return torch.empty_like(x[0])
        out = good(*x)
        return [out, *(out.clone() for _ in range(6))][0]

    def keyed_by_memory(self, q, k, v):
        """K packed once for each piece of memory, whatever it holds now."""
        packed = self.packed.setdefault(k.data_ptr(), k.clone())
        return good(q, packed, v)

    def jittering(self, *x):
        self.calls += 1
        return good(*x) * (1 + 2**-7 * (self.calls % 2))


def changes(name: str, by):
    def kernel(q, k, v):
        out = good(q, k, v)
        by({"q": q, "k": k, "v": v}[name])
        return out

    return kernel


def unwritten(rows: slice):
    def kernel(q, k, v):
        right_answer = good(q, k, v)
        out = torch.empty_like(q)
        out[:, :, rows] = right_answer[:, :, rows]
        return out

    return kernel


WRONG = {
    "garbage": (lambda q, *_: torch.randn_like(q), "oracle"),
    "zeros": (lambda q, *_: torch.zeros_like(q), "oracle"),
    "its query": (lambda q, *_: q.clone(), "oracle"),
    "its query, itself": (lambda q, *_: q, "oracle"),
    "infinity": (lambda *x: good(*x) / 0, "inf"),
    "a NaN": (lambda *x: good(*x).index_fill(3, torch.tensor(5), math.nan), "NaN in 800 of 800 rows"),
    "scales q in place": (changes("q", lambda q: q.mul_(2)), "changed its input q"),
    "changes one key": (changes("k", lambda k: k[0, 0, 0].add_(1)), "changed its input k"),
    "empties v": (changes("v", lambda v: v.zero_()), "changed its input v"),
    "previous output": ("previous", "oracle"),
    "first output for ever": ("first", "oracle"),
    "wrong every other time": ("every_other", "oracle"),
    "one buffer, right the second time": ("one_buffer_late", "oracle"),
    "right at last": ("last_only", "oracle"),
    "K cached by its memory": ("keyed_by_memory", "oracle"),
    "V through float16": (lambda q, k, v: good(q, k, v.half().to(W.dtype)), ""),
    "output through float16": (lambda *x: good(*x).half().to(W.dtype), "oracle"),
    "written once": ("written_once", ""),
    "nothing written": (lambda q, *_: torch.empty_like(q), ""),
    "last rows unwritten": (unwritten(slice(96)), ""),
    "first row unwritten": (unwritten(slice(1, None)), ""),
    "another scale": (lambda *x: attend(W, inputs.Inputs(*x), factor=1.02).to(W.dtype), "oracle"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_rejected(problem_of_w, what):
    kernel, words = WRONG[what]
    verdict = judged(problem_of_w, getattr(Stateful(), kernel) if isinstance(kernel, str) else kernel)
    assert verdict.failure
    assert words in verdict.failure
    assert "\n" not in verdict.failure
    assert not judged(problem_of_w, good).failure  # nothing it did reaches the next case


def test_a_kernel_that_changes_a_lone_query_is_rejected():
    """In layout "bshd" too, where the transpose of one query is the same memory."""
    w = Workload.parse("b2-h4kv2-q1kv64-d32-causal-bf16")
    problem = Problem(w, "cpu", 0)

    def right(*x):
        return attend(w, inputs.Inputs(*(t.transpose(1, 2) for t in x))).to(w.dtype).transpose(1, 2)

    def wrong(q, k, v):
        out = right(q, k, v)
        q.mul_(2)
        return out

    assert "changed its input q" in judged(problem, wrong, "bshd").failure
    assert not judged(problem, right, "bshd").failure  # nothing it did reaches the next case


@pytest.mark.parametrize("what", ["garbage", "zeros", "a NaN", "scales q in place", "previous output", "wrong every other time"])
def test_a_wrong_kernel_is_not_close_to_sdpa(problem_of_w, what):
    kernel, _ = WRONG[what]
    verdict = judged(problem_of_w, getattr(Stateful(), kernel) if isinstance(kernel, str) else kernel)
    assert verdict.sdpa_failure
    assert "SDPA itself" not in verdict.sdpa_failure


def test_memory_is_poisoned(problem_of_w):
    found = []

    def kernel(*x):
        found.append(float(torch.empty_like(x[0]).isnan().float().mean()) > 0.9)  # its allocator may keep notes in it
        return good(*x)

    for _ in range(5):
        assert not judged(problem_of_w, kernel).failure
    assert sum(found) >= len(found) / 2  # a CPU's allocator may hand out another piece now and then


def test_one_output_buffer_is_allowed(problem_of_w):
    assert not judged(problem_of_w, Stateful().one_buffer).failure


def test_kernels_that_do_not_repeat_are_noted(problem_of_w):
    assert not judged(problem_of_w, Stateful().jittering).bitwise_repeatable
    assert judged(problem_of_w, good).bitwise_repeatable


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda *x: (good(*x), None), "returned tuple, not a tensor"),
        (lambda *x: good(*x).float(), "dtype torch.float32"),
        (lambda *x: good(*x)[:, :, :50], "shape (2, 4, 50, 32)"),
        (lambda *x: good(*x).transpose(1, 2), "shape (2, 100, 4, 32)"),
        (lambda *x: good(*x).to("meta"), "device meta"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_output_of_another_kind_fails_the_case(problem_of_w, kernel, words):
    with pytest.raises(CaseFailed, match="mine") as caught:
        judged(problem_of_w, kernel)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_wrong_sdpa_is_named(monkeypatch, value):
    monkeypatch.setitem(REGISTRY, "sdpa", Implementation("sdpa", lambda _: lambda q, *_: torch.full_like(q, value)))
    problem = Problem(W, "cpu", 0)
    verdict = judged(problem, good)
    assert not verdict.failure
    assert "SDPA itself fails the oracle" in verdict.sdpa_failure
    agreeing = judged(problem, lambda q, *_: torch.zeros_like(q))
    assert "oracle" in agreeing.failure  # agreeing with a wrong SDPA does not help
    assert agreeing.sdpa_failure


def raising(error: Exception):
    def build(_):
        raise error

    return build


@pytest.mark.parametrize("error", [Unsupported("no"), RuntimeError("broken")], ids=repr)
def test_where_sdpa_cannot_run_only_the_oracle_judges(monkeypatch, error):
    monkeypatch.setitem(REGISTRY, "sdpa", Implementation("sdpa", raising(error)))
    verdict = judged(Problem(W, "cpu", 0), good)
    assert (verdict.failure, verdict.sdpa_failure) == ("", "")
    assert (verdict.sdpa_over_budget, verdict.sdpa_error_over_budget) == (None, None)
    assert judged(Problem(W, "cpu", 0), lambda q, *_: torch.zeros_like(q)).failure


def test_softcap_has_no_sdpa_to_compare_with():
    problem = Problem(W.replace(softcap=20.0), "cpu", 0)
    assert problem.sdpa is None
    assert judged(problem, good).failure  # good() knows no softcap of 20
