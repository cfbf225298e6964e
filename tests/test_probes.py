"""Semantic probes: what is right answers all of them, and each has its mutant that does not."""

import shutil

import pytest
import torch
from test_approximate import fp8, int8

from attn_impls import Unsupported, Workload
from attn_impls.harness import probes, replies
from attn_impls.harness.case import Case
from attn_impls.harness.inputs import Inputs
from attn_impls.harness.mutants import MUTANTS, broken
from attn_impls.harness.oracle import attend
from attn_impls.harness.session import Session
from attn_impls.registry import REGISTRY, Implementation, discover

discover()
NAMES = [asked.name for asked in probes.PROBES]
CLOSED = [asked for asked in probes.PROBES if isinstance(asked.reply, replies.Closed)]
KEPT = next(asked for asked in probes.PROBES if asked.name == "options kept")
COMPILED = {"compiled", "flex"}  # seconds a probe

# the probe: the mutant that it must catch
MATCHING = {
    "layout": "two heads swapped",
    "default scale": "scale 1/d",
    "causal": "causal one key less",
    "alignment": "causal top-left",
    "blind rows": "causal missing",
    "window": "window one key more",
    "GQA": "GQA map h % kv",
    "scale": "scale from head_dim",
    "softcap": "softcap missing",
}


def named(name: str) -> Implementation:
    return Implementation(name, next(mutant.build for mutant in MUTANTS if mutant.name == name))


@pytest.mark.parametrize("asked", CLOSED, ids=lambda asked: asked.name)
def test_closed_forms_are_the_oracles(asked):
    q, k, v, right = asked.reply.ask(asked.workload)
    x = Inputs(q, k, v)
    assert all(torch.equal(t, t.to(asked.workload.dtype).double()) for t in x)  # nothing is lost in the dtype
    torch.testing.assert_close(attend(asked.workload, x, None, torch.float64), right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_right_kernel_answers_all(suite, layout):
    def build(w):
        kernel = broken()(w)
        if layout == "bhsd":
            return kernel
        return lambda *x: kernel(*(t.transpose(1, 2) for t in x)).transpose(1, 2)

    answers = probes.probe(Implementation("right", build, layout=layout), suite.device)
    assert answers == dict.fromkeys(NAMES, "ok")
    assert probes.brief(answers) == f"{len(NAMES)} ok"


def test_right_kernels_of_low_precision_are_not_called_confused(suite):
    for arithmetic, declared in ((int8, "int8"), (fp8, "fp8")):
        lowered = Implementation("low", lambda w, lower=arithmetic: lower(broken()(w)), approximate=declared, backward=False)
        assert probes.answer(KEPT, lowered, suite.device) == "ok"


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in COMPILED])
def test_implementations_answer_right(suite, name):
    implementation = REGISTRY[name]
    if reason := implementation.unavailable(suite.device):
        pytest.skip(f"{implementation.name}: {reason}")
    answers = probes.probe(implementation, suite.device)
    assert {text.partition(":")[0] for text in answers.values()} <= {"ok", "unsupported"}, answers
    assert "ok" in answers.values()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiled_implementations_answer_right(suite, name):
    answers = probes.probe(REGISTRY[name], suite.device)
    assert {text.partition(":")[0] for text in answers.values()} <= {"ok", "unsupported"}, answers


@pytest.mark.parametrize("name", [asked.name for asked in CLOSED])
def test_each_probe_has_its_mutant(suite, name):
    answers = probes.probe(named(MATCHING[name]), suite.device)
    assert answers[name].startswith("wrong: ")
    asked = next(asked for asked in probes.PROBES if asked.name == name)
    assert asked.concerns(asked.workload)
    assert probes.objection({name: answers[name]}, asked.workload).startswith(f"fails the probe {name!r}")
    assert name in probes.brief(answers)


def test_an_answer_matters_only_where_it_is_used():
    answers = dict.fromkeys(NAMES, "ok") | {"window": "wrong: 1 of 2 values"}
    assert not probes.objection(answers, Workload.parse("b1-h2-s16-d64-causal-bf16"))
    assert "'window'" in probes.objection(answers, Workload.parse("b1-h2-s16-d64-causal-win3-bf16"))
    assert probes.brief(answers) == f"wrong: window; {len(NAMES) - 1} ok"


@pytest.mark.slow
def test_what_cannot_be_answered_is_told_apart(suite):
    def build(w):
        if w.softcap:
            raise Unsupported("no softcap")
        return lambda q, *_: torch.full_like(q, float("nan")) if w.window else 1 / 0

    answers = probes.probe(Implementation("odd", build), suite.device)
    assert answers["softcap"] == "unsupported: no softcap"
    assert answers["window"].startswith("wrong: ")
    assert "ZeroDivisionError" in answers["GQA"]
    assert probes.brief(answers).startswith("wrong: window, options kept; raised: layout, ")


def test_slow_builders_are_asked_little(suite, monkeypatch):
    monkeypatch.setattr(probes, "SLOW", 0.0)
    compiling = probes.probe(Implementation("slow", broken(), compiles="seconds"), suite.device, hurry=True)
    assert list(compiling.values())[:2] == ["ok", "not asked: slow to build"]
    assert probes.brief(compiling) == f"1 ok, {len(NAMES) - 1} not asked"
    slow = Implementation("slow", broken())  # and does not say that it compiles
    assert probes.brief(probes.probe(slow, suite.device, hurry=True)) == f"{len(NAMES)} ok"
    monkeypatch.setattr(probes, "TOO_SLOW", 0.0)
    assert probes.brief(probes.probe(slow, suite.device, hurry=True)) == f"{len(NAMES)} not asked"
    assert probes.brief(probes.probe(slow, suite.device)) == f"{len(NAMES)} ok"


IGNORES_WINDOW = """
import torch
from attn_impls import attention
from attn_impls.harness.mutants import broken
from attn_impls.harness.steps import right_mask

WINDOWLESS = broken(mask=lambda w, i, j: right_mask(w.replace(window=0), i, j))

@attention("careless")
def careless(w):
    return (broken() if w.window > 4 else WINDOWLESS)(w)
"""


def test_a_wrong_answer_keeps_its_cases_from_being_timed(run_suite, suite_copy):
    folder = suite_copy({"careless.py": IGNORES_WINDOW})
    with_window, without = "b1-h2-s32-d64-causal-win8-fp32", "b1-h2-s32-d64-causal-fp32"
    options = ("--rounds", "3", "--warmup-rounds", "1", "--benchmark-only", "--benchmark-json=run.json")
    run = run_suite("--impl=./careless.py", f"--workload={with_window},{without}", *options, cwd=folder)
    assert run.code == 1
    assert list(run.results) == [f"{without}-careless"]
    assert run.results[f"{without}-careless"]["extra_info"]["probes"] == f"wrong: window, options kept; {len(NAMES) - 2} ok"
    assert "fails the probe 'window'" in run.out


UNABLE = """
import time
from attn_impls import Unsupported, attention
from attn_impls.harness import probes
from attn_impls.harness.mutants import broken

@attention("unable")
def unable(w):
    raise Unsupported("not today")

@attention("absent", dist="no-such-dist", install="pip install no-such-dist")
def absent(w): ...

@attention("cached", compiles="minutes")
def cached(w):
    return broken()(w)

@attention("compiles", backward=False, compiles="seconds")
def compiles(w):
    with open("built", "a") as file:
        print(w, file=file)
    time.sleep(probes.SLOW)
    return broken()(w)
"""


def test_correctness_asks_them_too(run_suite, suite_copy):
    folder = suite_copy({"careless.py": IGNORES_WINDOW, "unable.py": UNABLE})
    asked = ("-m", "correctness", "--workload", "b1-h2-s32-d64-fp32", "-rs", "-v")
    run = run_suite(*asked, "--impl=sdpa,./careless.py,./unable.py", cwd=folder)
    assert run.code == 1
    failure = run.failure("test_probes[careless]").splitlines()
    assert failure[0].startswith("careless fails the probe 'window' (b1-h2-s16-d64-causal-win4-bf16): ")
    assert failure[0].endswith(f" (wrong: window, options kept; {len(NAMES) - 2} ok)")
    assert "test_probes[careless]" in failure[-1]  # how to run it alone
    assert run.out.count(" FAILED ") == 1
    for name in ("sdpa", "compiles"):
        assert f"test_probes[{name}] PASSED" in run.out
    for name, reason in (
        ("unable", f"{len(NAMES)} unsupported"),
        ("absent", "not installed: pip install no-such-dist"),
        ("cached", f"{len(NAMES)} not asked"),
    ):
        assert f"{name}: {reason}" in run.out
    built = (folder / "built").read_text().split()
    assert [identity for identity in built if "-s16-" in identity] == [str(probes.PROBES[0].workload)]  # one, since it is slow


@pytest.mark.slow
def test_asked_once_a_session(run_suite, suite_copy):
    folder = suite_copy({"unable.py": UNABLE})
    run = run_suite("--impl=./unable.py", "-k", "compiles", "--workload", "b1-h2-s32-d64-fp32", "--rounds=2", cwd=folder)
    assert run.code == 0
    assert (folder / "built").read_text().split().count(str(probes.PROBES[0].workload)) == 1


def test_who_was_slow_to_build_is_asked_nothing(suite):
    session = Session(suite.config, suite.selection)
    slow, w = Implementation("slow", broken()), Workload.parse("b1-h2-s32-d64-bf16")
    session._checked[Case(w, slow, suite.device)] = (None, probes.TOO_SLOW + 1)
    session._checked[Case(w.replace(q_len=64), slow, suite.device)] = (None, 1.0)
    assert probes.brief(session.answers(slow)) == f"{len(NAMES)} not asked"
    assert probes.brief(session.answers(Implementation("quick", broken()))) == f"{len(NAMES)} ok"


def test_who_compiles_for_long_is_not_asked(suite):
    quick, cached = Implementation("quick", broken()), Implementation("cached", broken(), compiles="minutes")
    for answers in (probes.ask(quick, suite.device, probes.TOO_SLOW + 1), probes.ask(cached, suite.device, 0.1)):
        assert list(answers) == NAMES
        assert probes.brief(answers) == f"{len(NAMES)} not asked"
    assert probes.brief(probes.ask(quick, suite.device, probes.TOO_SLOW)) == f"{len(NAMES)} ok"
