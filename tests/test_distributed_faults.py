"""Every fault of a rank, through torchrun: agreed on, named on rank 0's screen, over in time, and nothing passes falsely."""

import re
import time
from functools import partial

import pytest
from torchrun import ONE_CASE, STARTUP, TIMEOUT, copy_suite, finish, start, torchrun


@pytest.fixture
def suite_copy(tmp_path):
    return partial(copy_suite, tmp_path)


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


@pytest.mark.slow
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


ILL = """
import os
from attn_impls import attention
from attn_impls.handcrafted import handcrafted
from attn_impls.harness.case import DeviceLost

@attention("ill", dist="pytest", install="get well")
def ill(w):
    if os.environ.get("RANK") == "1":
        raise ImportError("its library lacks a symbol")
    return handcrafted(w)

@attention("deadly")
def deadly(w):
    kernel = handcrafted(w)
    def call(q, k, v):
        if os.environ.get("RANK") == "1":
            raise DeviceLost("deadly broke the CUDA context in its kernel: an illegal memory access, as it were")
        return kernel(q, k, v)
    return call
"""


@pytest.mark.slow
def test_a_library_that_is_broken_on_one_rank_is_so_on_all(suite_copy):
    folder = suite_copy(mine=ILL)
    run = torchrun(folder, *ONE_CASE[:2], "--impl", "./mine.py", "-k", "ill", "--form", "core,gather", "--benchmark-only", "-rs")
    assert run.code == 1
    assert "rank 1: ill is installed but broken (pytest" in run.out
    assert re.search(r"1 failed, 1 skipped", run.out), run.out  # loud once, then left out
    assert re.search(r"SKIPPED .* ill: rank 1: ill is installed but broken", run.out), run.out


@pytest.mark.slow
def test_a_lost_device_ends_the_run_at_once(suite_copy):
    folder = suite_copy(mine=ILL)
    chosen = ("--impl", "handcrafted,./mine.py", "-k", "handcrafted or deadly", "--form", "core,gather", *ONE_CASE[6:])
    run = torchrun(folder, "--benchmark-only", *ONE_CASE[:2], *chosen, "--benchmark-json=run.json", timeout=60)
    assert run.code != 0
    assert "rank 1: deadly broke the CUDA context in its kernel" in run.out
    assert "the CUDA device is lost, nothing more can run" in run.out
    assert [(b["extra_info"]["form"], b["extra_info"]["implementation"]) for b in run.benchmarks] == [("core", "handcrafted")]
    assert run.seconds < STARTUP


LOST = """
import os, time
import pytest
from attn_impls.harness.case import DeviceLost

pytestmark = pytest.mark.distributed
RANK = int(os.environ["RANK"])

def test_fault(spreads):
    def collective():
        if RANK == 1:
            raise DeviceLost("an illegal memory access, as it were")
        time.sleep(1000)  # in a collective, for a device that will never come
    spreads.ranks.guarded("talking", collective, collective=True)
"""


@pytest.mark.slow
def test_who_waits_for_a_lost_device_does_not_wait_for_the_timeout(suite_copy):
    run = torchrun(suite_copy(tests__test_lost=LOST), "tests/test_lost.py", timeout=300)
    assert run.code != 0
    assert "waits in talking for a device that is lost. rank 1: an illegal memory access" in run.out
    assert run.seconds < STARTUP
