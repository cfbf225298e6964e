"""`run_suite`: runs the suite end to end in a copy of it, for the tests of its command line, failures and results.

A run costs two seconds more than its own time to import torch, so a server that has imported it forks one process a run.
This file is also that server: `python conftest.py`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SUITE = ("conftest.py", "pytest.ini", "tests/test_benchmark.py", "tests/test_correctness.py")
OURS = ("PYTEST_", "CI", "GITHUB_", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "PYTHONUNBUFFERED")  # not the runs'


@dataclass(frozen=True)
class Run:
    """A run that ended: its exit code, what it printed, and the folder it ran in."""

    code: int
    out: str
    err: str
    cwd: Path

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """pytest-benchmark's dict of each case in run.json, by <workload>-<implementation>."""
        document = json.loads((self.cwd / "run.json").read_text())
        return {benchmark["param"]: benchmark for benchmark in document["benchmarks"]}

    @cached_property
    def names(self) -> dict[str, dict[str, Any]]:
        """The same by the test's name."""
        document = json.loads((self.cwd / "run.json").read_text())
        return {benchmark["name"]: benchmark for benchmark in document["benchmarks"]}

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]

    @property
    def ids(self) -> list[str]:
        """The test ids that --co -q listed, without their files."""
        return [line.partition("::")[2] for line in self.out.splitlines() if "::" in line]

    @property
    def table(self) -> str:
        """Our summary: from its title to the end."""
        return self.out[self.out.index("= attention =") :] if "= attention =" in self.out else ""

    def failure(self, test: str) -> str:
        """What was printed about a test that failed, "" if it did not."""
        lines = self.out.splitlines()
        starts = [n for n, line in enumerate(lines) if line.startswith("___") and f" {test} " in line]
        if not starts:
            return ""
        rest = lines[starts[0] + 1 :]
        end = next((n for n, line in enumerate(rest) if re.match("___|===|-+ benchmark ", line)), None)
        return "\n".join(rest[:end]).strip()


def copy_suite(folder: Path) -> Path:
    """What pytest needs to run the suite in a folder of its own, so that its journal and storage are there too."""
    (folder / "tests").mkdir(parents=True)
    for name in SUITE:
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def environment(changes: dict[str, str]) -> dict[str, str]:
    """A run's environment variables: none of this run's own, such as those of an xdist worker."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    fixed = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    fixed["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other take milliseconds a call
    return inherited | fixed | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | changes


@pytest.fixture(scope="module")
def one_thread():
    """For sizes far too small for more, on a machine that may be busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def suite_environment():
    return environment


@pytest.fixture
def fails(capsys):
    """fails(*arguments): what a command that ends with 2 says: one line on stderr, nothing on stdout."""
    from attn_impls.__main__ import main

    def run(*arguments: Any) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith(f"python -m attn_impls {arguments[0]}: ")
        return err

    return run


class Server:
    """The process that forks the runs."""

    def __init__(self, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, timeout: float, **request: Any) -> int | None:
        """The exit code, or None if there was none in time."""
        for path in (self.out, self.err):
            path.write_text("")
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request | {"out": str(self.out), "err": str(self.err)}), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        late = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
        late.start()
        code = int(self.process.stdout.readline())
        in_time = not late.finished.is_set()
        late.cancel()
        return code if in_time else None

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def suite_copy(tmp_path_factory):
    """Makes copies of the suite, with more files if given: `suite_copy({"mine.py": "…"})` is their folder."""

    def make(files: dict[str, str] | None = None) -> Path:
        folder = copy_suite(tmp_path_factory.mktemp("suite") / "suite")
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        return folder

    return make


@pytest.fixture(scope="session")
def run_suite(server, suite_copy):
    """`run_suite(*arguments)` runs pytest (or another module) in a copy of the suite (or in `cwd`) and returns its Run.

    fresh: in an ordinary process, not a forked one, for runs that depend on how a process starts or ends.
    bare: with these arguments only.
    """

    def run(*arguments: str, cwd=None, env=None, module="pytest", fresh=False, bare=False, timeout=60.0) -> Run:
        cwd = cwd or suite_copy()
        if module == "pytest" and not bare:
            arguments = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--device", "cpu", *arguments)
        if fresh:
            command = [sys.executable, "-m", module, *arguments]
            done = subprocess.run(
                command, cwd=cwd, env=environment(env or {}), capture_output=True, text=True, timeout=timeout, check=False
            )
            return Run(done.returncode, done.stdout, done.stderr, cwd)
        code = server.run(timeout, module=module, arguments=arguments, cwd=str(cwd), env=environment(env or {}))
        assert code is not None, f"no end within {timeout} s: {arguments}\n{server.out.read_text()}\n{server.err.read_text()}"
        return Run(code, server.out.read_text(), server.err.read_text(), cwd)

    return run


def serve() -> None:
    """Fork a process for each request on stdin; print its pid, then its exit code."""
    import torch._dynamo  # noqa: F401  (with torch, nearly all of what a run imports)

    gc.freeze()  # else each fork's collections copy all of it
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(**request)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def become(module: str, arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """`python -m module *arguments`, but for taking apart the interpreter at the end, which costs more than a short run."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    sys.path[0] = cwd
    sys.argv[1:] = arguments
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
