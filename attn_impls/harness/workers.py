"""pytest-xdist: how many workers, each on its own GPU, and why benchmarks do not run beside each other."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from ..workload import DTYPES

BENCHMARKS = "tests/test_benchmark.py"
REASON = "benchmarks do not run under pytest-xdist (-n): workers would time each other's noise; run them without -n, or with -n 0"


def auto_workers() -> int:
    """The GPUs there are, or the cores where there is none."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler if none was chosen (--dist): a workload's tests go to one worker, which needs its oracle only once."""
    if config.getoption("dist") != "load" or any(
        str(argument).startswith("--dist") for argument in config.invocation_params.args
    ):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByWorkload(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return workload_of(nodeid) or nodeid

    return ByWorkload(config, log)


def workload_of(nodeid: str) -> str:
    """The workload's id in that of a test over cases, or ""."""
    found = re.search(rf"\[(b\d\S*?-(?:{'|'.join(DTYPES)}))-", nodeid)
    return found[1] if found else ""


def pin() -> None:
    """In a worker, before CUDA starts: leave it one GPU of its own, or its share of the cores."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw"):
        return
    index, count = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    gpus_here = torch.cuda.device_count()  # asks NVML; is_available() would start CUDA, and fix what it sees
    if gpus_here:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(n) for n in range(gpus_here)]
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))


def in_parallel(config: pytest.Config) -> bool:
    """Whether tests run in several processes, seen from the controller or from a worker."""
    return bool(config.getoption("numprocesses", None)) or "PYTEST_XDIST_WORKER" in os.environ


def refuse_benchmarks(config: pytest.Config) -> None:
    """Raise pytest.UsageError if benchmarks were asked for by name under -n."""
    if not in_parallel(config):
        return
    wanted = config.getoption("benchmark_only", False)
    wanted |= bool(re.search(r"(?<!not )\bbenchmark\b", config.getoption("markexpr", "") or ""))
    wanted |= any(
        os.path.basename(BENCHMARKS) in argument for argument in config.invocation_params.args if isinstance(argument, str)
    )
    if wanted:
        raise pytest.UsageError(REASON)
