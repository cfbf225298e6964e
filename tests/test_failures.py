"""Implementations that fail, end to end: each costs its own case only, says why in a few lines, and how to run it alone."""

import re
import shlex
import textwrap
import time

import pytest

FIRST, SECOND = "b1-h2-s32-d16-fp32", "b1-h2kv1-s33-d16-causal-fp32"
QUICK = ("--rounds", "3", "--warmup-rounds", "1")
ONE, BOTH = ("--workload", FIRST, *QUICK), ("--workload", f"{FIRST},{SECOND}", *QUICK)
SAVED = ("--benchmark-only", "--benchmark-json=run.json")
LONGEST = 24  # lines of a failure

HEAD = '''
import ctypes, functools, os, signal, sys, time
import torch
from torch.nn.functional import scaled_dot_product_attention
from attn_impls import Unsupported, attention

def right(w):
    return functools.partial(scaled_dot_product_attention, is_causal=w.causal, enable_gqa=w.group > 1)

def in_rounds():
    """Whether pytest-benchmark's rounds are what calls."""
    frame = sys._getframe()
    while frame and "pedantic" not in frame.f_code.co_name:
        frame = frame.f_back
    return frame is not None

calls = 0

def third_round():
    """Whether this is the third of the rounds that pytest-benchmark calls: of the timed ones the second."""
    global calls
    time.sleep(0.002)  # long enough for one call a round
    calls += in_rounds()
    return in_rounds() and calls == 3

left, seen = [], set()

def last_or_this(out):
    """An output, or in rounds the one before it."""
    time.sleep(0.002)  # long enough for one call a round
    left.append(out)
    return left[-2] if in_rounds() else out

def must(fail):
    raise fail
'''

# name: (what its kernel returns, what is said of it)
WRONG_KERNELS = {
    "garbage": ("torch.randn_like(q)", "differs from the float64 oracle"),
    "scaled": ("right(w)(q * 1.02, k, v)", "differs from the float64 oracle"),
    "zeros": ("torch.zeros_like(q)", "differs from the float64 oracle"),
    "nan": ("torch.full_like(q, float('nan'))", "returned NaN"),
    "one_nan": ("right(w)(q, k, v).index_put_([torch.tensor([0])] * 4, torch.tensor(float('nan')))", "returned NaN in 1 of"),
    "infinite": ("right(w)(q, k, v) / 0", "differs from the float64 oracle"),
    "shape": ("right(w)(q, k, v)[:, :, 1:]", "returned shape (1, 2, 3"),
    "dtype": ("right(w)(q, k, v).double()", "returned dtype torch.float64, expected torch.float32"),
    "device": ("right(w)(q, k, v).to('meta')", "returned device meta, expected cpu"),
    "sparse": ("right(w)(q, k, v).to_sparse()", "returned a tensor of torch.sparse_coo, expected a dense one"),
    "pair": ("(right(w)(q, k, v), None)", "returned tuple, not a tensor"),
    "nothing": ("None", "returned NoneType, not a tensor"),
    "mutates": ("(right(w)(q, k, v), k.zero_())[0]", "changed its input k"),
    "mutates_in_rounds": ("(right(w)(q, k, v), in_rounds() and k.zero_())[0]", "changed its input k while it was timed"),
    "zeros_in_rounds": (
        "right(w)(q, k, v) * (not in_rounds())",
        "differs from the float64 oracle in 4 of 4 rounds, warm-up included (first: round 1): its worst row errs ",
    ),
    "left_over": (
        "last_or_this(right(w)(q, k, v))",
        "differs from the float64 oracle in 4 of 4 rounds, warm-up included (first: round 1): its worst row errs ",
    ),
    "changes_settings": (
        "(right(w)(q, k, v), torch.set_grad_enabled(False))[0]",
        "changed whether gradients are recorded (True → False) for everybody in its kernel: set it back there",
    ),
    "wrong_at_first": (
        "seen.add(w) or q * 0 if w not in seen else right(w)(q, k, v)",
        "differs from the float64 oracle in its first call alone: its worst row errs ",
    ),
    "spoils_and_raises": (
        "(k.zero_(), must(OSError('spoilt'))) if in_rounds() else right(w)(q, k, v)",
        "raised in its kernel: OSError: spoilt",
    ),
    "raises": ("must(RuntimeError('boom\\n' * 200))", "raised in its kernel: RuntimeError: boom"),
    "raises_in_round": (
        "must(OSError('late')) if third_round() else right(w)(q, k, v)",
        "raised in its kernel: OSError: late",
    ),
    "out_of_memory": (
        "must(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
        " of which 2.71 GiB is free. Including non-PyTorch memory, this process has 76.46 GiB memory in use.'))",
        "ran out of memory in its kernel: tried to allocate 64.00 GiB, of 79.18 GiB 2.71 GiB were free",
    ),
    "unsupported_late": (
        "must(Unsupported('not today')) if in_rounds() else right(w)(q, k, v)",
        "only a builder or a first call may raise Unsupported, not a later one: not today",
    ),
    "exits": ("sys.exit(0)", "raised in its kernel: SystemExit"),
    "recurses": ("(f := lambda: f())()", "raised in its kernel: RecursionError"),
}
# name: (what its builder returns, what is said of it)
WRONG_BUILDERS = {
    "builds_nothing": ("None", "its builder returned None"),
    "builder_raises": ("must(ZeroDivisionError('bang'))", "raised in its builder: ZeroDivisionError: bang"),
    "builder_out_of_memory": ("must(torch.OutOfMemoryError('no room'))", "ran out of memory in its builder"),
    "builder_changes_settings": (
        "(torch.set_num_threads(torch.get_num_threads() + 1), right(w))[1]",
        "changed the number of threads (1 → 2) for everybody in its builder",
    ),
    "builder_exits": ("sys.exit('bye')", "raised in its builder: SystemExit: bye"),
    "builder_imports": ("__import__('a_library_that_nobody_has')", "raised in its builder: ModuleNotFoundError"),
}
BAD = WRONG_KERNELS | WRONG_BUILDERS
BROKEN = ('"broken", dist=["no-such-dist", "pytest"], install="pip install pytest"', "__import__('a_library_that_nobody_has')")
ABSENT = ('"absent", dist="no-such-dist", install="pip install no-such-dist"', "None")
UNABLE = ('"unable"', "must(Unsupported('no odd lengths')) if w.q_len % 2 else right(w)")


def source(*registered):
    """A file of implementations, each given as the decorator's arguments and the builder's value."""
    texts = [f"@attention({arguments})\ndef _(w):\n    return {value}\n" for arguments, value in registered]
    return textwrap.dedent(HEAD) + "\n".join(texts)


def kernel(value):
    return f"lambda q, k, v: {value}"


ALL = [(f'"{name}"', kernel(value)) for name, (value, _) in WRONG_KERNELS.items()]
ALL += [(f'"{name}"', value) for name, (value, _) in WRONG_BUILDERS.items()]


def rerun_of(failure):
    """The command that a failure ends with."""
    command = failure.splitlines()[-1]
    assert command.startswith("pytest "), failure
    return command


@pytest.fixture(scope="module")
def bad_run(run_suite, suite_copy):
    """Good implementations before and after all the bad ones, on two workloads."""
    folder = suite_copy({"bad.py": source(*ALL, BROKEN, ABSENT, UNABLE)})
    return run_suite(*BOTH, *SAVED, "--impl=sdpa,./bad.py,handcrafted", cwd=folder)


def test_bad_implementations_cost_their_own_cases_only(bad_run):
    assert bad_run.code == 1
    failed = len(FAILED) + 1  # and "broken" once
    assert f"{failed} failed, 6 passed, 4 skipped" in bad_run.out
    good = {FIRST: ("sdpa", "unable", "handcrafted"), SECOND: ("sdpa", "raises_in_round", "handcrafted")}
    good = [f"{identity}-{name}" for identity, names in good.items() for name in names]
    assert list(bad_run.results) == good
    for result in bad_run.results.values():
        assert result["stats"]["rounds"] == 3
        assert 0 < result["extra_info"]["error_over_budget"] <= 1


FAILED = [(identity, name) for identity in (FIRST, SECOND) for name in BAD if (identity, name) != (SECOND, "raises_in_round")]


@pytest.mark.parametrize(("identity", "name"), FAILED)
def test_failure_says_why_and_how_to_run_it_alone(bad_run, identity, name):
    _, said = BAD[name]
    failure = bad_run.failure(f"test_forward[{identity}-{name}]")
    assert failure.startswith(name)
    assert said in failure
    assert len(failure.splitlines()) <= LONGEST
    assert not any(machinery in failure for machinery in ("harness", "registry.py", "pytest_benchmark"))
    command = rerun_of(failure)
    assert f"tests/test_benchmark.py::test_forward[{identity}-{name}]" in command
    assert "--impl=sdpa,./bad.py,handcrafted" in command


@pytest.mark.parametrize("name", BAD)
def test_table_says_why_a_case_has_no_time(bad_run, name):
    lines = [line.split() for line in bad_run.table.splitlines()]
    reasons = [line[2:] for line in lines if line[:2] == [name, "FAILED:"]]
    assert reasons
    assert not any(reason[0].rstrip(":") in (name, "Failed") for reason in reasons)


def test_failures_bring_no_warnings(bad_run):
    assert "warnings summary" not in bad_run.out


def test_skips_say_why(bad_run):
    assert "absent  " in bad_run.table
    assert "not installed: pip install no-such-dist" in bad_run.table
    assert "no odd lengths" in bad_run.table


def test_correctness_fails_where_the_benchmark_does(run_suite, bad_run):
    run = run_suite(*ONE, "-m", "correctness", "--impl=sdpa,./bad.py,handcrafted", cwd=bad_run.cwd)
    assert run.code == 1
    in_rounds = {"raises_in_round", "mutates_in_rounds", "zeros_in_rounds", "left_over", "spoils_and_raises", "unsupported_late"}
    for name in BAD.keys() - in_rounds:
        for test in ("test_oracle", "test_allclose_to_sdpa"):
            failure = run.failure(f"{test}[{FIRST}-{name}]")
            assert failure.startswith(name), (test, name)
            assert rerun_of(failure)
    for name in ("sdpa", "handcrafted", "unable", "absent"):
        assert not run.failure(f"test_oracle[{FIRST}-{name}]")


def test_whole_run_says_why_in_its_table(run_suite, suite_copy):
    """Where the correctness tests run after the benchmarks, and fail too."""
    names = ('"zeros"', '"pair"')
    folder = suite_copy({"bad.py": source(*(registered for registered in ALL if registered[0] in names))})
    run = run_suite(*ONE, "--impl=sdpa,./bad.py", cwd=folder)
    assert run.code == 1
    assert re.search(r"^  zeros +FAILED: differs from (the float64 oracle|SDPA)", run.table, re.MULTILINE)
    assert re.search(r"^  pair +FAILED: returned tuple", run.table, re.MULTILINE)


@pytest.mark.parametrize("where", [pytest.param(".", marks=pytest.mark.slow), "tests"])
def test_rerun_command_reproduces_the_failure(run_suite, suite_copy, where):
    folder = suite_copy()
    (folder / where / "bad.py").write_text(source(*ALL))
    arguments = ("--workload", FIRST, "--impl", "./bad.py", "--seed", "7", "-m", "correctness", "-k", "zeros")
    failure = run_suite(*arguments, cwd=folder / where).failure(f"test_oracle[{FIRST}-zeros]")
    command = rerun_of(failure)
    again = run_suite(*shlex.split(command)[1:], cwd=folder / where, bare=True, fresh=where == ".")
    assert again.code == 1, again.out + again.err
    assert "1 failed" in again.out
    assert "seed 7" in again.out
    assert again.failure(f"test_oracle[{FIRST}-zeros]").splitlines()[0] == failure.splitlines()[0]


# libraries


def test_broken_library_is_one_loud_failure(run_suite, suite_copy):
    folder = suite_copy({"broken.py": source(BROKEN)})
    run = run_suite(*BOTH, *SAVED, "--impl=./broken.py,sdpa", "-rs", cwd=folder)
    assert run.code == 1
    assert "1 failed, 2 passed, 1 skipped" in run.out
    failure = run.failure(f"test_forward[{FIRST}-broken]")
    assert failure.startswith("broken is installed but broken (pytest ")
    assert "a_library_that_nobody_has" in failure
    assert "pip install pytest" in failure
    assert re.search(r"^SKIPPED \[1\].*: broken.*installed but broken", run.out, re.MULTILINE)
    assert run.table.count("installed but broken") == 2
    assert list(run.results) == [f"{FIRST}-sdpa", f"{SECOND}-sdpa"]


def test_required_library_that_is_absent_fails(run_suite, suite_copy):
    folder = suite_copy({"absent.py": source(ABSENT)})
    run = run_suite(*ONE, *SAVED, "--impl=./absent.py,sdpa", "--require-impl=absent,flash_attn2,sdpa", cwd=folder)
    assert run.code == 1
    assert re.search("1 passed.*2 errors|2 failed, 1 passed", run.out)
    assert "not installed: pip install no-such-dist" in run.failure(f"test_forward[{FIRST}-absent]")
    assert "--require-impl" in run.failure(f"test_forward[{FIRST}-flash_attn2]")
    assert list(run.results) == [f"{FIRST}-sdpa"]


# runs that end early


def journal_of(run):
    (journal,) = (run.cwd / ".benchmarks" / "journal").glob("*.jsonl")
    return journal


def test_hung_kernel_is_named_and_finished_results_are_saved(run_suite, suite_copy):
    folder = suite_copy({"hangs.py": source(('"hangs"', kernel("time.sleep(60)")))})
    started = time.perf_counter()
    run = run_suite(*ONE, *SAVED, "--impl", "sdpa,./hangs.py,handcrafted", "--case-timeout", "2", cwd=folder)
    assert time.perf_counter() - started < 20
    assert run.code == 1
    assert f"HUNG: tests/test_benchmark.py::test_forward[{FIRST}-hangs]" in run.err
    assert list(run.results) == [f"{FIRST}-sdpa"]
    command = run.errors[-1].removeprefix("rerun this one alone: ")
    assert command.startswith(f"pytest 'tests/test_benchmark.py::test_forward[{FIRST}-hangs]'")
    assert "--impl sdpa,./hangs.py,handcrafted" in command


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
def test_hung_builder_leaves_a_journal(run_suite, suite_copy, hang):
    folder = suite_copy({"hangs.py": source(('"hangs"', hang))})  # the second holds the interpreter's lock
    run = run_suite(*ONE, "--benchmark-only", "--impl", "sdpa,./hangs.py", "--case-timeout", "3", cwd=folder)
    assert run.code == 1
    assert "hangs.py" in run.err
    command = f"python -m attn_impls journal {journal_of(run)} -o run.json"
    assert command in run.err or "PyDLL" in hang
    made = run_suite(*command.split()[3:], module="attn_impls", cwd=folder)
    assert (made.code, made.out) == (0, "1 finished cases: run.json\n")
    assert list(made.results) == [f"{FIRST}-sdpa"]


def test_killed_run_leaves_a_journal_that_becomes_json(run_suite, suite_copy):
    folder = suite_copy({"killer.py": source(('"killer"', kernel("os.kill(os.getpid(), signal.SIGKILL)")))})
    run = run_suite(*BOTH, *SAVED, "--benchmark-save=x", "--impl=sdpa,handcrafted,./killer.py", cwd=folder)
    assert run.code == -9
    assert not (folder / "run.json").exists()
    made = run_suite("journal", str(journal_of(run)), "-o", "run.json", module="attn_impls", cwd=folder)
    assert made.code == 0
    assert list(made.results) == [f"{FIRST}-sdpa", f"{FIRST}-handcrafted"]
    compared = run_suite("compare", "./run.json", module="pytest_benchmark", cwd=folder)
    assert compared.code == 0
    assert f"{FIRST}-handcrafted" in compared.out


def test_interrupted_rounds_are_not_saved(run_suite, suite_copy):
    interrupts = kernel("must(KeyboardInterrupt()) if third_round() else right(w)(q, k, v)")
    folder = suite_copy({"interrupts.py": source(('"interrupts"', interrupts))})
    run = run_suite(*ONE, *SAVED, "--impl=sdpa,./interrupts.py,handcrafted", cwd=folder)
    assert run.code == 2
    assert list(run.results) == [f"{FIRST}-sdpa"]
    assert len(journal_of(run).read_text().splitlines()) == 2  # the header and sdpa
    assert "sdpa" in run.table
