"""python -m attn_impls gate: what it runs and in what order, what fails, what cannot be told, and what it leaves behind.

The runs are of a fake pytest, a pytest.py in the folder they run in, which writes the JSON that a run would have written.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attn_impls.__main__ import main

TESTS = Path(__file__).parent
FAKE_PYTEST = f"""
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from fakes import saved_case, saved_run

arguments = sys.argv[1:]
values = {{flag: value for flag, _, value in (argument.partition("=") for argument in arguments)}}
thing = Path(values["--impl"]) if "--impl" in values else Path("speed.py")
settings = {{"slow": 1.0, "sdpa": 1.0, "ceiling": 1.0, "noise": 0.001, "gone": (), "code": 0, "sleep": 0}}
settings |= {{"torch": "2.13.0", "threads": 1}}
settings["n"] = int(Path(values["--benchmark-json"]).stem[1:])  # which pair it is
exec(thing.read_text(), settings)
exec(os.environ.get("SPEED", ""), settings)

with open(os.environ["LOG"], "a+") as log:
    print(json.dumps([Path(values["--benchmark-json"]).stem, arguments, os.getcwd(), os.getpid()]), file=log)
    log.seek(0)
    noise = 1 + settings["noise"] * (len(log.readlines()) * 7919 % 11 - 5) / 5
time.sleep(settings["sleep"])
print("some output\\nand why it ended")
sdpa, slow = settings["sdpa"] * noise, settings["slow"]
cases = [saved_case("sdpa", sdpa), saved_case("slow", slow * noise, sdpa / slow), saved_case("same", noise, sdpa)]
for case in cases:
    case["extra_info"]["ceiling_tflops"] = settings["ceiling"]
gone = [*settings["gone"], *(case["extra_info"]["implementation"] for case in cases if case["fullname"] in arguments)]
kept = [case for case in cases if case["extra_info"]["implementation"] not in gone]
if settings["code"] != 3:
    document = saved_run(*kept, torch=settings["torch"], threads=settings["threads"])
    Path(values["--benchmark-json"]).write_text(json.dumps(document))
sys.exit(settings["code"])
"""


def git(folder, *arguments):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose tags are versions of what is measured."""
    folder = tmp_path_factory.mktemp("gate") / "repository"
    folder.mkdir()
    (folder / "pytest.py").write_text(FAKE_PYTEST)
    git(folder, "init", "-q", "-b", "main")
    for tag, settings in {"v1": "slow = 1.0", "v2": "slow = 1.1"}.items():
        (folder / "speed.py").write_text(settings)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", tag)
        git(folder, "tag", tag)
    (folder / "speed.py").write_text("slow = 9.9  # not committed")
    return folder


@pytest.fixture
def gate(repository, tmp_path, capsys, monkeypatch):
    """gate(baseline, candidate, *options): the exit code, the verdicts by case, and what was printed. Sides may be settings."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def side(name, what):
        if "=" not in what:
            return what
        (tmp_path / f"{name}.py").write_text(what)
        return str(tmp_path / f"{name}.py")

    def run(baseline, candidate, *options, arguments=()):
        sides = [f"--baseline={side('baseline', baseline)}"] if baseline else []
        sides += [f"--candidate={side('candidate', candidate)}"] if candidate else []
        code = main(["gate", *sides, "--pairs=3", *options, *(["--", *arguments] if arguments else [])])
        out, err = capsys.readouterr()
        words = [line.split() for line in out.splitlines()]
        return code, {row[2]: row[0] for row in words if len(row) > 2 and row[1].startswith("b1-")}, out + err

    return run


@pytest.fixture
def log(tmp_path):
    """What ran: [name of the JSON, arguments, folder, process] of each."""
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_a_slower_candidate_fails(gate):
    code, verdicts, out = gate("slow = 1", "slow = 1.1")
    assert (code, verdicts) == (1, {"sdpa": "SAME", "slow": "REGRESSED", "same": "SAME"})
    assert "gate: FAILED" in out
    assert "+10.0 %" in out


def test_the_same_passes(gate):
    code, verdicts, out = gate("slow = 1", "slow = 1")
    assert (code, set(verdicts.values())) == (0, {"SAME"})
    assert "gate: passed" in out


def test_a_faster_candidate_passes(gate):
    code, verdicts, _ = gate("slow = 1", "slow = 0.9")
    assert (code, verdicts["slow"]) == (0, "IMPROVED")


def test_slower_by_less_than_the_floor_passes(gate):
    assert gate("slow = 1", "slow = 1.025")[0] == 0
    assert gate("slow = 1", "slow = 1.025", "--floor=2")[0] == 1


def test_sides_alternate_in_processes_of_their_own(gate, log):
    gate("slow = 1", "slow = 1", "--pairs=4")
    names, _, _, processes = zip(*log(), strict=True)
    assert list(names) == ["A1", "B1", "B2", "A2", "A3", "B3", "B4", "A4"]
    assert len(set(processes)) == 8


def test_pytest_gets_what_stands_after_the_dashes(gate, log):
    gate("slow = 1", "slow = 1", arguments=["--workload", "seed", "-k", "sdpa or mine"])
    for _, arguments, _, _ in log():
        assert arguments[:4] == ["--workload", "seed", "-k", "sdpa or mine"]
        assert "--benchmark-only" in arguments


def test_refs_are_checked_out_and_removed(gate, log, repository):
    before = git(repository, "worktree", "list"), git(repository, "status", "--short")
    code, verdicts, _ = gate("v1", "v2")
    assert (code, verdicts["slow"]) == (1, "REGRESSED")
    folders = {folder for _, _, folder, _ in log()}
    assert len(folders) == 2
    assert not any(os.path.exists(folder) for folder in folders)
    assert (git(repository, "worktree", "list"), git(repository, "status", "--short")) == before


def test_a_virtual_environment_runs_here_with_its_python(gate, log, repository, tmp_path):
    for name, settings in (("one", "slow = 1"), ("two", "slow = 1.1")):
        (tmp_path / name / "bin").mkdir(parents=True)
        script = tmp_path / name / "bin" / "python"
        script.write_text(f"#!/bin/sh\nSPEED='{settings}' exec {sys.executable} \"$@\"\n")
        script.chmod(0o755)
    assert gate(str(tmp_path / "one"), str(tmp_path / "two"))[0] == 1
    assert {folder for _, _, folder, _ in log()} == {str(repository)}


def test_cheap_stops_after_three_pairs_where_nothing_looks_slower(gate, log):
    assert gate("slow = 1", "slow = 1", "--cheap", "--pairs=5")[0] == 0
    assert len(log()) == 6


def test_cheap_repeats_the_suspects_alone(gate, log):
    code, verdicts, out = gate("slow = 1", "slow = 1.1", "--cheap", "--pairs=5")
    assert (code, verdicts) == (1, {"slow": "REGRESSED", "sdpa": "SAME", "same": "SAME"})
    runs = log()
    assert len(runs) == 10
    for _, arguments, _, _ in runs[6:]:
        left_out = [arguments[n + 1] for n, argument in enumerate(arguments) if argument == "--deselect"]
        assert [name.rpartition("-")[2] for name in left_out] == ["sdpa]", "same]"]
    pairs = {line.split()[2]: line.split()[-1] for line in out.splitlines() if line[:4] in ("SAME", "REGR")}
    assert pairs == {"slow": "5", "sdpa": "3", "same": "3"}


def test_a_machine_that_moved_is_not_told(gate):
    code, _, out = gate("slow = 1; ceiling = 1.0", "slow = 1; ceiling = 0.9")
    assert code == 2
    assert "gate: CANNOT SAY: the fixed matmul took another time on the two sides (bf16 +11.1 %)" in out


@pytest.mark.parametrize(("slow", "code", "ending"), [(1.0, 2, "CANNOT SAY"), (1.1, 1, "FAILED")])
def test_a_restless_machine_lets_nothing_pass(gate, slow, code, ending):
    found, verdicts, out = gate("slow = 1", f"slow = {slow}; ceiling = [0.94, 0.6, 0.94][n - 1]")
    assert found == code
    assert f"gate: {ending}" in out
    assert verdicts["same"] == "SAME"


def test_another_torch_is_judged_by_time(gate):
    """SDPA and all else became 10 % slower, so that nothing did against SDPA."""
    code, verdicts, out = gate("slow = 1", "slow = 1.1; sdpa = 1.1; torch = '9.9'")
    assert (code, verdicts) == (1, {"sdpa": "REGRESSED", "slow": "REGRESSED", "same": "SAME"})
    assert "SDPA may differ (torch 2.13.0 → 9.9)" in out


@pytest.mark.parametrize("code", [1, 4])
def test_a_side_that_fails_is_2_with_its_last_lines(gate, log, code):
    found, _, out = gate("slow = 1", f"slow = 1; code = {code}")
    assert found == 2
    assert f"ended with {code}; its last lines:\n    some output\n    and why it ended" in out
    assert "candidate" in out
    assert len(log()) == 2


def test_a_side_without_a_result_is_2(gate):
    found, _, out = gate("slow = 1; code = 0; gone = ('sdpa', 'slow', 'same')", "slow = 1")
    assert found == 2
    assert "ended without a result; its last lines:\n    some output" in out


def test_a_side_that_loses_a_case_is_2_with_its_last_lines(gate, log):
    found, _, out = gate("slow = 1", "slow = 1; gone = ('same',)")
    assert found == 2
    assert "lost 1 of 3 cases (b1-h2-s128-d64-bf16 same); its last lines:\n    some output" in out
    assert len(log()) == 2


def test_sides_that_cannot_be_compared_are_found_at_once(gate, log):
    code, _, out = gate("slow = 1", "slow = 1; threads = 8")
    assert code == 2
    assert "1 and 8 torch threads" in out
    assert len(log()) == 2


def test_a_new_case_is_no_matter(gate):
    assert gate("slow = 1; gone = ('same',)", "slow = 1")[:2] == (0, {"sdpa": "SAME", "slow": "SAME", "same": "NEW"})


def test_calibrate_prints_a_floor(gate, log):
    code, _, out = gate("v2", "", "--calibrate", "--pairs=4")
    assert code == 0
    assert {Path(folder).name for _, _, folder, _ in log()} == {git(Path.cwd(), "rev-parse", "v2")[:12]}
    assert "0 of 3 cases would have failed" in out
    assert "floor for 4 pairs here: --floor 1\n" in out


def test_calibrate_needs_a_higher_floor_where_there_is_noise(gate):
    _, _, out = gate("slow = 1; noise = 0.2", "", "--calibrate")
    (line,) = (line for line in out.splitlines() if line.startswith("floor for"))
    assert float(line.rpartition(" ")[2]) > 5


def test_runs_are_kept_where_asked(gate, tmp_path, capsys):
    kept = tmp_path / "deep" / "kept"
    code, _, _ = gate("slow = 1", "slow = 1.1", f"--keep={kept}")
    files = [[str(kept / f"{side}{n}.json") for n in (1, 2, 3)] for side in "AB"]
    assert main(["compare", "--baseline", *files[0], "--candidate", *files[1]]) == code == 1
    assert "slow" in capsys.readouterr().out
    assert (kept / "A1.log").read_text().startswith("some output")


def test_markdown(gate):
    code, _, out = gate("slow = 1", "slow = 1.1", "--markdown")
    assert code == 1
    assert out.startswith("**1 REGRESSED")
    assert "| REGRESSED |" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--baseline=nonsense", "--candidate=v2"), "--baseline 'nonsense': give a git ref"),
        (("--baseline=v1", "--candidate=--upload-pack=x"), "--candidate '--upload-pack=x': give a git ref"),
        (("--baseline=v1", "--candidate=absent.py"), "--candidate 'absent.py': there is no such file"),
        (("--baseline=v1",), "give --baseline A --candidate B"),
        (("--candidate=v1",), "give --baseline A --candidate B"),
        (("--calibrate", "--baseline=v1", "--candidate=v2"), "or --calibrate --baseline A"),
        ((), "give --baseline A --candidate B"),
        (("--baseline=v1", "--candidate=v2", "--pairs=2"), "--pairs 2: give 3 or more"),
        (("--prove=nothing",), "--prove 'nothing': no such implementation"),
    ],
)
def test_what_is_given_wrongly_is_one_line(repository, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(repository)
    assert main(["gate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_ref_outside_a_repository_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["gate", "--baseline=main", "--candidate=main"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_gate_leaves_nothing(repository, tmp_path, number):
    worktrees = git(repository, "worktree", "list")
    below = repository / "below"  # python -m would find the fake pytest beside it
    below.mkdir(exist_ok=True)
    log = tmp_path / "log"
    environment = {"PYTHONPATH": str(TESTS.parent), "LOG": str(log), "TMPDIR": str(tmp_path), "SPEED": "sleep = 60"}
    process = subprocess.Popen(
        [sys.executable, "-m", "attn_impls", "gate", "--baseline=v1", "--candidate=v2"],
        cwd=below, env=os.environ | environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (_, _, folder, child) = json.loads(log.read_text())
    assert Path(folder).is_dir()
    process.send_signal(number)
    assert process.wait(30) == 130
    assert process.stderr.read().splitlines()[-1].startswith("gate: interrupted")
    assert not Path(f"/proc/{child}").exists()
    assert not Path(folder).exists()
    assert git(repository, "worktree", "list") == worktrees
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


REAL = """
from attn_impls import attention
from torch.nn.functional import scaled_dot_product_attention as f

@attention("mine")
def mine(w):
    def kernel(q, k, v):
        for _ in range({times}):
            out = f(q, k, v, is_causal=w.causal)
        return out
    return kernel
"""


@pytest.mark.slow
def test_a_real_gate_finds_a_kernel_that_does_its_work_twice(suite_copy, suite_environment):
    folder = suite_copy({"once.py": REAL.format(times=1), "twice.py": REAL.format(times=2)})
    command = [sys.executable, "-m", "attn_impls", "gate", "--baseline=once.py", "--candidate=twice.py", "--pairs=3", "--",
               "tests/test_benchmark.py", "--workload=b8-h2-s64-d64-fp32", "--rounds=20", "--device=cpu"]  # fmt: skip
    environment = suite_environment({"PYTHONPATH": str(TESTS.parent)})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 REGRESSED" in done.stdout
    assert not (folder / ".benchmarks" / "journal").exists()  # where --resume looks for a killed run's


@pytest.mark.slow
def test_prove_measures_what_it_adds(suite_copy, suite_environment):
    command = [sys.executable, "-m", "attn_impls", "gate", "--prove=handcrafted", "--pairs=3", "--floor=3", "--",
               "tests/test_benchmark.py", "--workload=b100-h1-s64-d64-fp32", "--rounds=20", "--device=cpu"]  # fmt: skip
    environment = suite_environment({"PYTHONPATH": str(TESTS.parent)})
    done = subprocess.run(command, cwd=suite_copy(), env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in (0, 2), done.stdout + done.stderr  # 2: the machine moved
    lines = [line for line in done.stdout.splitlines() if line.startswith("+")]
    assert [line.split()[0] for line in lines] == ["+0", "+2", "+5", "+10"]
    assert all(" of 1 cases failed" in line for line in lines)
