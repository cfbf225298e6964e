"""The machinery of distributed runs, started through torchrun as a user would: who speaks, what is agreed, and every fault."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SUITE = ("conftest.py", "pytest.ini", "tests/test_distributed.py")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTEST_", "OMP_NUM_THREADS")
WORKLOAD = "b1-h4kv2-s64-d32-causal-fp32"
ONE_CASE = ("--workload", WORKLOAD, "--impl", "handcrafted", "--form", "core", "--rounds", "20", "--warmup-rounds", "1")
PLAIN = ("-p", "no:cacheprovider", "--device", "cpu")  # a machine may have fewer GPUs than these runs have ranks
TIMEOUT = 10
STARTUP = 40  # seconds that a loaded machine may take to import torch in every rank


@dataclass(frozen=True)
class Run:
    code: int
    out: str  # of all ranks and of torchrun, as on a screen
    seconds: float
    cwd: Path

    @property
    def benchmarks(self):
        return json.loads((self.cwd / "run.json").read_text())["benchmarks"]


@pytest.fixture
def suite_copy(tmp_path):
    """Copies the suite's distributed tests to a folder, with more files beside them."""

    def copy(**files):
        (tmp_path / "tests").mkdir()
        for name in SUITE:
            (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
        for name, text in files.items():
            (tmp_path / f"{name.replace('__', '/')}.py").write_text(text)
        return tmp_path

    return copy


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(folder, *arguments, ranks=2, launcher=()):
    launcher = launcher or ("--standalone", "--nproc-per-node", str(ranks))
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "pytest", *PLAIN, *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, folder, began, limit):
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"did not end within {limit} s:\n{out[-3000:]}")
    return Run(process.returncode, out, time.monotonic() - began, folder)


def torchrun(folder, *arguments, ranks=2, timeout=TIMEOUT):
    """A run with --rank-timeout, bounded by it: the promise is that all ranks end within it and 10 s."""
    began = time.monotonic()
    process = start(folder, "--rank-timeout", str(timeout), *arguments, ranks=ranks)
    return finish(process, folder, began, STARTUP + timeout + 10)


def check_one_voice(run, ranks):
    """Rank 0 alone prints, and one JSON file holds the slowest rank's time of every round."""
    assert run.code == 0, run.out
    assert run.out.count("test session starts") == run.out.count(f"attention on {ranks} ranks") == 1
    assert [path.name for path in run.cwd.glob("*.json*")] == ["run.json"]
    assert len(list((run.cwd / ".benchmarks" / "journal").glob("*"))) == 1
    assert len(list((run.cwd / ".benchmarks" / "ranks").glob("*.log"))) == ranks - 1


def check_facts(document, ranks):
    assert document["machine_info"]["world_size"] == ranks
    assert document["machine_info"]["backend"] == "gloo"
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        medians = info["median_s_by_rank"]
        assert len(medians) == ranks
        assert info["slowest_rank"] == medians.index(max(medians))
        assert benchmark["stats"]["median"] >= max(medians) * (1 - 1e-9)
        assert info["imbalance"] >= 1
        assert info["efficiency"] == pytest.approx(info["speedup"] / ranks)
        assert info["error_over_budget"] <= 1
        assert all(not isinstance(value, dict) for value in info.values())


FORMS = ("core", "gather", "gather-overlapped", "project", "project-scatter")
NEITHER = (("gather-copied", "handcrafted"), ("dtensor", "handcrafted"))  # copy engines are a GPU's; DTensor knows SDPA alone


def test_two_ranks_speak_with_one_voice(suite_copy):
    folder = suite_copy()
    chosen = ("--impl", "handcrafted,flash_attn3", "--workload", "b1-h8kv4-s64-d32-causal-fp32", "--rounds", "20")
    run = torchrun(folder, "--benchmark-only", "--benchmark-json=run.json", "--warmup-rounds", "1", *chosen)
    check_one_voice(run, 2)
    document = json.loads((folder / "run.json").read_text())
    check_facts(document, 2)
    assert [b["extra_info"]["form"] for b in document["benchmarks"]] == list(FORMS)
    assert {b["group"] for b in document["benchmarks"]} == {"b1-h8kv4-s64-d32-causal-fp32"}
    core, gather = document["benchmarks"][:2]
    assert core["extra_info"]["exposed_s"] == 0.0
    assert core["extra_info"].get("collective") is None
    assert gather["extra_info"]["exposed_s"] == pytest.approx(gather["stats"]["median"] - gather["extra_info"]["silent_s"])
    assert gather["extra_info"]["message_bytes"] == 8 * 64 * 32 * 4 // 2
    assert gather["extra_info"]["probe_bus_gb_per_s"] > 0
    assert "flash_attn3: runs on cuda only" in run.out
    assert "DTensor knows how to shard SDPA only" in run.out
    reasons = {(one["form"], one["implementation"]): one["reason"] for one in document["not_run"]}
    assert set(reasons) == {*((form, "flash_attn3") for form in (*FORMS, "gather-copied", "dtensor")), *NEITHER}
    assert reasons["core", "flash_attn3"].startswith("flash_attn3: runs on cuda only")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharding_mutants_are_rejected(suite_copy, ranks):
    """tests/test_sharding_mutants.py and tests/test_makespan.py, which need ranks."""
    names = "test_sharding_mutants", "test_makespan", "fakes"
    folder = suite_copy(**{f"tests__{name}": (REPOSITORY / "tests" / f"{name}.py").read_text() for name in names})
    run = torchrun(folder, "tests/test_sharding_mutants.py", "tests/test_makespan.py", ranks=ranks, timeout=60)
    assert run.code == 0, run.out
    assert re.search(r"= 5\d passed(, \d+ skipped)? in", run.out), run.out


@pytest.mark.slow
def test_four_ranks_share_heads_and_kv_heads(suite_copy):
    folder = suite_copy()
    chosen = ("--impl", "handcrafted,sdpa", "--workload", "b2-h8kv2-s64-d32-causal-bf16", "--rounds", "20")
    run = torchrun(folder, "--benchmark-json=run.json", "--warmup-rounds", "1", *chosen, ranks=4, timeout=60)
    check_one_voice(run, 4)
    check_facts(json.loads((folder / "run.json").read_text()), 4)
    assert "test_tensor_parallel_gradients" not in run.out  # all passed


@pytest.mark.slow
def test_one_rank_is_enough(suite_copy):
    folder = suite_copy()
    run = torchrun(folder, "--benchmark-json=run.json", *ONE_CASE, ranks=1)
    check_one_voice(run, 1)
    info = run.benchmarks[0]["extra_info"]
    assert info["speedup"] == pytest.approx(1.0, rel=0.5)


@pytest.mark.slow
def test_results_compare_with_those_of_as_many_ranks_only(suite_copy):
    folder = suite_copy()
    assert torchrun(folder, "--benchmark-only", "--benchmark-save=base", *ONE_CASE).code == 0
    saved = list((folder / ".benchmarks").glob("*/0001_base.json"))
    assert len(saved) == 1
    run = torchrun(folder, "--benchmark-only", "--benchmark-compare=0001", *ONE_CASE)
    assert run.code == 0, run.out
    assert "(0001_base)" in run.out
    run = torchrun(folder, "--benchmark-only", "--benchmark-compare=0001", *ONE_CASE, ranks=1)
    assert run.code != 0
    assert "this run is on 1 ranks, that one was on 2" in run.out


@pytest.mark.slow
def test_heads_that_cannot_be_shared_are_padded_on_request_only(suite_copy):
    folder = suite_copy()
    chosen = ("--workload", "b1-h3-s64-d32-fp32", "--impl", "handcrafted", "--form", "core,gather", "--rounds", "20", "-rs")
    run = torchrun(folder, *chosen)
    assert run.code == 0
    assert "heads (3) is not divisible by the 2 ranks; --pad-heads computes 4 heads instead of 3" in run.out
    run = torchrun(folder, *chosen, "--pad-heads", "--benchmark-json=run.json")
    assert run.code == 0, run.out
    assert [b["extra_info"]["padding_bound"] for b in run.benchmarks] == [0.75, 0.75]


@pytest.mark.slow
def test_two_nodes_over_loopback(suite_copy):
    folder, began = suite_copy(), time.monotonic()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "loopback")
    where = ("--nnodes", "2", "--nproc-per-node", "1", *meeting)
    nodes = [start(folder, *ONE_CASE, "--benchmark-json=run.json", launcher=where) for _ in range(2)]
    runs = [finish(node, folder, began, 2 * STARTUP) for node in nodes]
    assert [run.code for run in runs] == [0, 0], runs[0].out + runs[1].out
    assert sum("attention on 2 ranks" in run.out for run in runs) == 1
    document = json.loads((folder / "run.json").read_text())
    assert (document["machine_info"]["nodes"], document["machine_info"]["world_size"]) == (2, 2)


AGREEMENT = """
import os
import pytest, torch, torch.distributed as dist
from attn_impls.registry import Unsupported

pytestmark = pytest.mark.distributed
RANK = int(os.environ["RANK"])

@pytest.fixture
def broken_on_rank_1():
    if RANK == 1:
        raise RuntimeError("setup broke here")

def test_setup(broken_on_rank_1):
    dist.all_reduce(torch.ones(1))

def test_assertion_on_one_rank():
    print("what rank", RANK, "printed")
    assert RANK != 1, "only rank 1 minds"

def test_raises_before_a_collective(spreads):
    def local():
        if RANK == 1:
            raise ValueError("raised before the collective")
    spreads.ranks.guarded("a local phase", local)
    dist.all_reduce(torch.ones(1))

def test_out_of_memory(spreads):
    def local():
        if RANK == 1:
            raise torch.OutOfMemoryError("asked for 10 GiB, there were 2")
    spreads.ranks.guarded("allocating", local)

def test_lacks_a_library():
    pytest.importorskip("os" if RANK == 0 else "a_library_that_is_not_there")

def test_later():
    one = torch.full((4,), 7.0)
    dist.all_reduce(one)
    assert one.tolist() == [14.0] * 4
"""


def test_one_rank_s_outcome_is_every_rank_s(suite_copy):
    """Raises before a collective, runs out of memory, lacks a library: agreed, and what follows is not disturbed."""
    run = torchrun(suite_copy(tests__test_agreement=AGREEMENT), "tests/test_agreement.py", "-rs")
    assert run.code == 1
    assert re.search(r"3 failed, 1 passed, 1 skipped(, \d+ deselected)?, 1 error", run.out), run.out
    for culprit in (
        "setup broke here",
        "only rank 1 minds",
        "what rank 1 printed",
        "raised before the collective",
        "asked for 10 GiB",
    ):
        assert culprit in run.out
    assert "rank 1:" in run.out
    assert "a_library_that_is_not_there" in run.out
    assert "tests/test_agreement.py::test_later" not in run.out


FAULT = """
import os, signal, time
import pytest, torch, torch.distributed as dist

pytestmark = pytest.mark.distributed
RANK = int(os.environ["RANK"])

def test_fault(spreads):
    if RANK == 1:
        %s
    dist.all_reduce(torch.ones(1))

def test_later():
    one = torch.full((4,), 7.0)
    dist.all_reduce(one)
    assert one.tolist() == [14.0] * 4
"""
# what rank 1 does, and what rank 0's screen must say about it
FAULTS = {
    "raises-where-others-communicate": (
        "raise ValueError('rank 1 gave up')",
        ["ValueError: rank 1 gave up", "poison|a collective failed"],
    ),
    "raises-in-a-collective-phase": (
        "spreads.ranks.guarded('talking', lambda: int('no number'), collective=True)\n"
        "    else:\n        spreads.ranks.guarded('talking', lambda: dist.all_reduce(torch.ones(1)), collective=True)",
        ["ValueError: invalid literal", "a collective failed"],
    ),
    "exits": ("os._exit(3)", [r"rank 1: its process \d+ is gone", r"exitcode\s*: 3"]),
    "is-killed": ("os.kill(os.getpid(), signal.SIGKILL)", [r"rank 1: its process \d+ is gone", "SIGKILL"]),
    "stalls": ("time.sleep(1000)", ["rank 1: stuck for", r"time\.sleep\(1000\)"]),
    "stalls-holding-the-interpreter": ("import ctypes; ctypes.PyDLL(None).sleep(1000)", ["rank 1: gave no sign"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_every_rank_in_time(suite_copy, fault):
    code, signs = FAULTS[fault]
    folder = suite_copy(tests__test_fault=FAULT % code)
    run = torchrun(folder, "tests/test_distributed.py", "tests/test_fault.py", *ONE_CASE, "--benchmark-json=run.json", "-v")
    (journal,) = folder.glob(".benchmarks/journal/*.jsonl")
    assert time.time() - journal.stat().st_mtime < TIMEOUT + 10  # since the case before the fault was finished
    assert run.code != 0
    for sign in signs:
        assert re.search(sign, run.out), f"{sign} is not on the screen:\n{run.out}"
    assert not re.search(r"test_(fault|later) PASSED", run.out), run.out
    assert [b["extra_info"]["form"] for b in run.benchmarks] == ["core"]


@pytest.mark.slow
def test_sigterm_keeps_what_is_finished(suite_copy):
    """torchrun's own SIGTERM: rank 0 is in a collective that will never end."""
    folder, began = suite_copy(tests__test_fault=FAULT % "time.sleep(1000)"), time.monotonic()
    process = start(folder, "tests/test_distributed.py", "tests/test_fault.py", *ONE_CASE, "--benchmark-json=run.json", "-s")
    while not list(folder.glob(".benchmarks/journal/*.jsonl")):
        assert time.monotonic() - began < STARTUP
        time.sleep(0.2)
    time.sleep(3)
    told = time.monotonic()
    process.terminate()
    run = finish(process, folder, began, STARTUP)
    assert time.monotonic() - told < 20
    assert run.code != 0
    assert [b["extra_info"]["form"] for b in run.benchmarks] == ["core"]


DIFFERENT = """
import os
import pytest

pytestmark = pytest.mark.distributed

@pytest.mark.parametrize("n", range(2 + int(os.environ["RANK"])))
def test_numbered(n):
    pass
"""


@pytest.mark.slow
def test_different_collections_are_shown_and_nothing_runs(suite_copy):
    run = torchrun(suite_copy(tests__test_different=DIFFERENT), "tests/test_different.py")
    assert run.code != 0
    assert "the ranks collected different tests" in run.out
    assert "rank 1: 3 tests" in run.out
    assert "only there: tests/test_different.py::test_numbered[2]" in run.out
    assert "passed" not in run.out
    assert run.seconds < STARTUP


LACKING = """
import os
from attn_impls import Unsupported, attention
from attn_impls.handcrafted import handcrafted

@attention("lacking")
def lacking(w):
    if os.environ.get("RANK") == "1":
        raise Unsupported("this rank's library is too old")
    return handcrafted(w)

@attention("hungry")
def hungry(w):
    import torch
    kernel = handcrafted(w)
    def call(q, k, v):
        if os.environ.get("RANK") == "1" and q.shape[1] == w.heads:
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        return kernel(q, k, v)
    return call
"""


@pytest.mark.slow
def test_an_implementation_that_fails_on_one_rank(suite_copy):
    folder = suite_copy(mine=LACKING)
    chosen = (*ONE_CASE[:2], "--impl", "./mine.py,handcrafted", *ONE_CASE[4:])
    run = torchrun(folder, "--benchmark-only", *chosen, "--benchmark-json=run.json", "-rs")
    assert run.code == 1
    assert "rank 1: this rank's library is too old" in run.out
    assert "rank 1: hungry ran out of memory in its kernel" in run.out
    assert [b["extra_info"]["implementation"] for b in run.benchmarks] == ["handcrafted"]


@pytest.mark.slow
def test_nothing_selected_is_no_crash(suite_copy):
    run = torchrun(suite_copy(), "-k", "no_such_test")
    assert run.code == 0
    assert "no distributed test was selected" in run.out
    assert "Traceback" not in run.out


@pytest.mark.slow
def test_usage_errors_are_said_once(suite_copy):
    folder = suite_copy()
    errors = {"-n2": "pytest-xdist (-n) and torchrun do not go together", "--form=cores": "nearest: core"}
    for argument, said in errors.items():
        run = torchrun(folder, argument)
        assert run.code != 0
        assert run.out.count(said) == 1, run.out
        assert "exitcode  : 4" in run.out


def test_without_torchrun_one_line_says_how(suite_copy):
    folder = suite_copy()
    command = [sys.executable, "-m", "pytest", *PLAIN, *ONE_CASE]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=STARTUP, check=False)
    assert run.returncode == 5
    lines = [line for line in run.stdout.splitlines() if "torchrun --nproc-per-node N -m pytest -m distributed" in line]
    assert lines == ["2 distributed tests left out; run them with: torchrun --nproc-per-node N -m pytest -m distributed"]
