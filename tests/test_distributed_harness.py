"""The machinery of distributed runs, started through torchrun as a user would: who speaks, what is measured, what is refused."""

import json
import re
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from torchrun import ONE_CASE, PLAIN, REPOSITORY, STARTUP, copy_suite, environment, finish, start, torchrun

from attn_impls import Workload


@pytest.fixture
def suite_copy(tmp_path):
    return partial(copy_suite, tmp_path)


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
    assert not list((folder / "tmp").glob("attn-impls-*"))
    document = json.loads((folder / "run.json").read_text())
    check_facts(document, 2)
    assert [b["extra_info"]["form"] for b in document["benchmarks"]] == list(FORMS)
    assert {b["group"] for b in document["benchmarks"]} == {"b1-h8kv4-s64-d32-causal-fp32"}
    core, gather = document["benchmarks"][:2]
    assert core["extra_info"]["exposed_s"] == 0.0
    assert core["extra_info"].get("collective") is None
    chunks = {b["extra_info"]["form"]: b["extra_info"].get("overlap_chunks") for b in document["benchmarks"]}
    assert chunks == dict.fromkeys(FORMS) | {"gather-overlapped": [4, 2, 1, 1]}
    assert core["extra_info"]["pad_heads"] is False
    assert gather["extra_info"]["silent_s"] > 0
    assert gather["extra_info"]["exposed_s"] < gather["stats"]["max"]
    assert gather["extra_info"]["message_bytes"] == 8 * 64 * 32 * 4 // 2
    assert gather["extra_info"]["probe_bus_gb_per_s"] > 0
    assert "flash_attn3: runs on cuda only" in run.out
    assert "DTensor knows how to shard SDPA only" in run.out
    reasons = {(one["form"], one["implementation"]): one["reason"] for one in document["not_run"]}
    assert set(reasons) == {*((form, "flash_attn3") for form in (*FORMS, "gather-copied", "dtensor")), *NEITHER}
    assert reasons["core", "flash_attn3"].startswith("flash_attn3: runs on cuda only")


NEED_RANKS = ("test_sharding_mutants", "test_sharding_gradients", "test_copied", "test_makespan")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_needs_ranks_passes(suite_copy, ranks):
    """The files of tests that torchrun alone can run, among them the sharding mutants."""
    folder = suite_copy(
        **{f"tests__{name}": (REPOSITORY / "tests" / f"{name}.py").read_text() for name in (*NEED_RANKS, "fakes", "sharding")}
    )
    run = torchrun(folder, *(f"tests/{name}.py" for name in NEED_RANKS), ranks=ranks, timeout=120)
    assert run.code == 0, run.out
    assert int(re.search(r"= (\d+) passed", run.out)[1]) > 110, run.out


@pytest.mark.slow
def test_four_ranks_share_heads_and_kv_heads(suite_copy):
    folder = suite_copy()
    chosen = ("--impl", "handcrafted,sdpa", "--workload", "b2-h8kv2-s64-d32-causal-bf16", "--rounds", "20")
    run = torchrun(folder, "--benchmark-json=run.json", "--warmup-rounds", "1", *chosen, ranks=4, timeout=60)
    check_one_voice(run, 4)
    check_facts(json.loads((folder / "run.json").read_text()), 4)
    assert "test_tensor_parallel_gradients" not in run.out  # all passed


@pytest.mark.slow
def test_the_backward_pass_alone_is_timed_with_what_it_sends(suite_copy):
    folder = suite_copy()
    identity = "b1-h8kv2-s64-d32-causal-bf16"
    chosen = ("--impl", "handcrafted,flex", "--workload", identity, "--direction", "backward", "--rounds", "20")
    run = torchrun(folder, "--benchmark-only", "--benchmark-json=run.json", "--warmup-rounds", "1", *chosen, ranks=4, timeout=60)
    check_one_voice(run, 4)
    check_facts(json.loads((folder / "run.json").read_text()), 4)
    infos = {b["extra_info"]["form"]: b["extra_info"] for b in run.benchmarks}
    assert list(infos) == ["core", "gather", "project", "project-scatter"]
    assert {b["group"] for b in run.benchmarks} == {f"{identity} backward"}
    w = Workload.parse(identity)
    for info in infos.values():
        assert (info["direction"], info["flops"]) == ("backward", w.flops("backward"))
    dk_dv = 2 * 64 * 32 * 2  # of the one KV head that two ranks share
    assert (infos["core"]["collective"], infos["core"]["message_bytes"]) == ("all_reduce", dk_dv)
    rows = 64 * 8 * 32 * 2 // 4
    scattered = infos["project-scatter"]
    assert (scattered["collective"], scattered["message_bytes"]) == ("all_gather + all_reduce", rows + dk_dv)
    assert infos["core"]["silent_s"] > 0
    assert 0.0 != infos["core"]["exposed_s"] < run.benchmarks[0]["stats"]["max"]
    assert "flex: forward only" in run.out
    assert "gather-overlapped × handcrafted: its backward pass is that of 'gather'" in run.out
    assert f"{identity}   backward" in run.out


LIMITED = """
import torch
from attn_impls import Unsupported, attention
from attn_impls.registry import REGISTRY

class Limited(torch.autograd.Function):
    @staticmethod
    def forward(_, q):
        return q.clone()

    @staticmethod
    def backward(_, gradient):
        if gradient.shape[1] > 4:
            raise Unsupported("no backward beyond 4 heads")
        return gradient

@attention("limited")
def limited(w):
    kernel = REGISTRY["sdpa-math"](w)
    return lambda q, k, v: kernel(Limited.apply(q), k, v)
"""


@pytest.mark.slow
def test_a_backward_pass_that_one_rank_lacks_is_timed_on_two(suite_copy):
    folder = suite_copy(limited=LIMITED)
    chosen = ("--workload", "b1-h8-s64-d32-fp32", "--impl", "limited.py", "--form", "core", "--direction", "backward")
    run = torchrun(folder, "--benchmark-only", "--benchmark-json=run.json", "--rounds", "7", *chosen)
    assert run.code == 0, run.out
    (info,) = (b["extra_info"] for b in run.benchmarks)
    assert info["one_rank_missing"] == "no backward beyond 4 heads"
    assert info["speedup"] is info["one_rank_s"] is None


REFUSES = """
from attn_impls import Unsupported, attention
from attn_impls.registry import REGISTRY

def refusing(w, refused):
    right = REGISTRY["sdpa-math"](w)

    def kernel(q, k, v):
        if refused(v):
            raise Unsupported("not these")
        return right(q, k, v)

    return kernel

@attention("first", backward=False)
def first(w):
    return refusing(w, lambda v: w.heads == 4)  # a rank's share

@attention("choosy", backward=False)
def choosy(w):
    return refusing(w, lambda v: v.abs().max() > 1000)  # the inputs that expose
"""


@pytest.mark.slow
def test_a_kernel_may_refuse_in_its_first_call_and_not_later(suite_copy):
    folder = suite_copy(refuses=REFUSES)
    chosen = ("--workload", "b1-h8-s64-d32-fp32", "--impl", "refuses.py", "--form", "core,gather", "--direction", "forward")
    run = torchrun(folder, "--benchmark-only", "--rounds", "7", *chosen)
    assert run.code == 1
    assert "  first: not these" in run.out
    assert re.search(r"2 failed, 2 skipped", run.out), run.out
    assert "choosy: only a builder or a first call may raise Unsupported, not a later one: not these" in run.out


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
    assert [(b["extra_info"]["pad_heads"], b["extra_info"]["padding_bound"]) for b in run.benchmarks] == 2 * [(True, 0.75)]
    assert run.out.count("≤ 75.0 %") == 2


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


@pytest.mark.slow
def test_nothing_selected_is_no_crash(suite_copy):
    folder, one_gpu = suite_copy(), "forward+backward is timed on one GPU only"
    for chosen, says in (("-k", "no_such_test"), False), (("--benchmark-only", "--direction", "forward+backward"), True):
        run = torchrun(folder, *chosen)
        assert run.code == 0
        assert "no distributed test was selected" in run.out
        assert (one_gpu in run.out) == says
        assert "Traceback" not in run.out


@pytest.mark.slow
def test_usage_errors_are_said_once(suite_copy):
    folder = suite_copy()
    errors = {
        "-n2": "pytest-xdist (-n) and torchrun do not go together",
        "--form=cores": "nearest: core",
        "--overlap-along=columns": "--overlap-along 'columns': give auto, heads, rows",
        "--overlap-streams=2": "--overlap-streams '2': give two whole numbers above 0, with a comma between",
    }
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
    assert lines == ["distributed tests are left out; run them with: torchrun --nproc-per-node N -m pytest -m distributed"]
