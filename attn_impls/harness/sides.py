"""The two things that a gate compares, as ways to run pytest: a git ref, a virtual environment, a file of implementations."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import journal, saved

LAST_LINES = 15  # of a run that failed
PATIENCE_SECONDS = 10.0  # between SIGTERM and SIGKILL


class SideFailed(Exception):
    """A run of one side gave no result: what it was, and its last lines."""


@dataclass(frozen=True)
class Side:
    name: str  # "baseline" or "candidate"
    what: str
    folder: Path  # that pytest runs in
    python: str = sys.executable
    arguments: tuple[str, ...] = ()

    def run(self, arguments: Sequence[str], output: Path) -> saved.Run:
        """One run in a process of its own, its JSON in `output`. Raises SideFailed."""
        command = [self.python, "-m", "pytest", *arguments, *self.arguments, "--benchmark-only", f"--benchmark-json={output}"]
        with _log(output).open("wb") as file:
            try:
                process = subprocess.Popen(
                    command, cwd=self.folder, env=self._environment(output.parent), stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SideFailed(f"{self.name} {self.what!r} does not start: {error}") from None
            with _ended(process):
                code = process.wait()
        if code:
            raise self.failed(f"ended with {code}", output)
        try:
            return saved.read(output)
        except ValueError:
            raise self.failed("ended without a result", output) from None

    def failed(self, why: str, output: Path) -> SideFailed:
        lines = _log(output).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        return SideFailed("\n".join([f"{self.name} {self.what!r} {why}; its last lines:", *(f"    {line}" for line in lines)]))

    def _environment(self, folder: Path) -> dict[str, str]:
        """The checkout before whatever attn_impls is installed, and journals beside the results."""
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), journal.FOLDER_VARIABLE: str(folder.absolute() / "journals")}


def _log(output: Path) -> Path:
    return output.with_suffix(".log")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """On any exception, a Ctrl-C included, end the run and what it started."""
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
                break
        raise


@contextlib.contextmanager
def opened(baseline: str, candidate: str) -> Iterator[tuple[Side, Side]]:
    """Both sides, ready to run; checkouts are removed in the end. Raises ValueError with one line."""
    with contextlib.ExitStack() as stack:
        yield _side("baseline", baseline, stack), _side("candidate", candidate, stack)


def _side(name: str, what: str, stack: contextlib.ExitStack) -> Side:
    path, here = Path(what), Path.cwd()
    if what.endswith(".py"):
        if not path.is_file():
            raise ValueError(f"--{name} {what!r}: there is no such file")
        return Side(name, what, here, arguments=(f"--impl={path.resolve()}",))
    if path.is_dir() and (path / "bin" / "python").exists():
        return Side(name, what, here, python=str(path.absolute() / "bin" / "python"))  # not resolved: that leaves the venv
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{what}^{{commit}}")
    if found.returncode:
        raise ValueError(
            f"--{name} {what!r}: give a git ref of the repository here, "
            "a virtual environment (a folder with bin/python), or a .py file"
        )
    return Side(name, what, stack.enter_context(_checkout(found.stdout.split()[-1])))


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """A temporary worktree of the repository that holds the current directory."""
    parent = Path(tempfile.mkdtemp(prefix="attn-impls-gate-"))
    folder = parent / commit[:12]
    try:
        made = _git("worktree", "add", "--detach", str(folder), commit)
        if made.returncode:
            raise ValueError(f"git worktree add {commit[:12]}: {made.stderr.strip().splitlines()[-1]}")
        yield folder
    finally:
        removed = _git("worktree", "remove", "--force", str(folder))
        shutil.rmtree(parent, ignore_errors=True)
        if removed.returncode:
            _git("worktree", "prune")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        # apart from our group, so that a Ctrl-C of the terminal does not stop it half-way
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, start_new_session=True)
    except OSError:
        return subprocess.CompletedProcess(arguments, 1, "", "git is not installed")
