"""Implementations that fail, end to end: each costs its own case only, says why in a few lines, and how to run it alone."""

import re
import shlex
import time

import pytest
from bad_implementations import ABSENT, ALL, BAD, BROKEN, UNABLE, kernel, source

FIRST, SECOND = "b1-h2-s32-d16-fp32", "b1-h2kv1-s33-d16-causal-fp32"
QUICK = ("--rounds", "3", "--warmup-rounds", "1")
ONE, BOTH = ("--workload", FIRST, *QUICK), ("--workload", f"{FIRST},{SECOND}", *QUICK)
SAVED = ("--benchmark-only", "--benchmark-json=run.json")
LONGEST = 24  # lines of a failure


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
