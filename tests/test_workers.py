"""Each pytest-xdist worker on a GPU of its own."""

import os
import re

import pytest
import torch

from attn_impls.harness import workers
from attn_impls.presets import COMBINATIONS, DEFAULT_PRESETS
from attn_impls.rare import RARE


@pytest.mark.parametrize(
    ("visible", "worker", "expected"),
    [(None, "gw0", "0"), (None, "gw1", "1"), (None, "gw2", "0"), ("3,5", "gw1", "5"), ("3,5", "gw0", "3")],
)
def test_workers_take_the_visible_gpus_in_turn(monkeypatch, visible, worker, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this starts CUDA, which then sees no change"))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_without_xdist_nothing_is_pinned(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers.pin()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("tests/test_correctness.py::test_oracle[b1-h8kv2-s256-d128-causal-bf16-sdpa-flash]", "b1-h8kv2-s256-d128-causal-bf16"),
        ("tests/test_correctness.py::test_oracle[b2-h4-q1kv9-d96v64-fp32-flex]", "b2-h4-q1kv9-d96v64-fp32"),
        ("tests/test_distributed.py::test_tensor_parallel[b1-h2-s64-d64-fp16-core-sdpa]", "b1-h2-s64-d64-fp16"),
        ("tests/test_correctness.py::test_probes[sdpa-flash]", ""),
        ("tests/test_workload.py::test_ids[b1-h2]", ""),
        ("tests/test_workload.py::test_round_trip", ""),
    ],
)
def test_the_workload_of_a_test_is_told_from_its_id(nodeid, expected):
    assert workers.workload_of(nodeid) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "workloads"), [(("--workload", "small,odd"), 2), ((), len(DEFAULT_PRESETS) + len(COMBINATIONS) + len(RARE))]
)
def test_a_workload_s_tests_go_to_one_worker(run_suite, arguments, workloads):
    run = run_suite("-n", "2", "-m", "correctness", *arguments, "--impl", "sdpa,sdpa-math", "-v")
    assert run.code == 0
    found = re.findall(r"^\[(gw\d)\].*(?:PASSED|SKIPPED) \S+py::\S+\[(b\d+-h\S+?)-(?:sdpa|sdpa-math)\]", run.out, re.M)
    assert len(found) > 2 * workloads
    places = {workload: {worker for worker, one in found if one == workload} for _, workload in found}
    assert [len(workers) for workers in places.values()] == workloads * [1]
    assert len(re.findall(r"PASSED tests/test_correctness.py::test_probes\[(?:sdpa|sdpa-math)\]", run.out)) == 2


def test_a_chosen_distribution_is_left_alone(pytestconfig, monkeypatch):
    class Invocation:
        args = ("-n", "2", "--dist=load")

    monkeypatch.setattr(pytestconfig, "invocation_params", Invocation)
    monkeypatch.setattr(pytestconfig.option, "dist", "load")
    assert workers.scheduler(pytestconfig, None) is None
