"""Runs of the suite through torchrun, as a user would start them, in a copy of its distributed tests."""

import json
import os
import signal
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


def copy_suite(folder, **files):
    """The suite's distributed tests in a folder, with more files beside them."""
    (folder / "tests").mkdir()
    for name in SUITE:
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for name, text in files.items():
        (folder / f"{name.replace('__', '/')}.py").write_text(text)
    return folder


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(folder, *arguments, ranks=2, launcher=()):
    launcher = launcher or ("--standalone", "--nproc-per-node", str(ranks))
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "pytest", *PLAIN, *arguments]
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | {"TMPDIR": str(folder / "tmp")},
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
