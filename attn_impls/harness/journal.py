"""Results that survive: each finished case is appended and flushed at once, and a journal becomes pytest-benchmark JSON.

A journal is JSON lines: first {"header": everything of the JSON but the benchmarks, "options": …, "package": …,
"sources": …}, which --resume looks at, then one benchmark a line, or {"not_run": a case and the reason why it has no benchmark}.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEEP = 30  # in the folder
FOLDER_VARIABLE = "ATTN_IMPLS_JOURNALS"  # the environment's name for another folder: a gate's runs are none to --resume


def folder(root: Path) -> Path:
    """Where the journals of runs in a rootdir are."""
    return Path(os.environ.get(FOLDER_VARIABLE) or root / ".benchmarks" / "journal")


class Journal:
    """One run's journal. The file is created with the first finished case."""

    def __init__(self, folder: Path, conditions: dict[str, Any] | None = None):
        """conditions: what else the numbers depend on; written beside the header."""
        self.folder, self.conditions = folder, conditions or {}
        self.path: Path | None = None
        self.finished = 0
        self._before: list[dict[str, Any]] = []  # what did not run before the first finished case

    def leave_out(self, cell: dict[str, str]) -> None:
        """Append why a case has no result: what names it, and "reason"."""
        if self.path is None:
            self._before.append({"not_run": cell})
        else:
            self._append([{"not_run": cell}])

    def add(self, header: dict[str, Any], benchmark: dict[str, Any]) -> None:
        """Append one case (pytest-benchmark's dict of it) and hand it to the disk."""
        lines = [benchmark]
        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in sorted(self.folder.glob("*.jsonl"))[: -KEEP + 1]:
                old.unlink(missing_ok=True)
            self.path = self.folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}.jsonl"
            lines = [{"header": {**header, "not_run": []}, **self.conditions}, *self._before, benchmark]
        self._append(lines)
        self.finished += 1

    def _append(self, lines: list[dict[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, default=str) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def go_on(self, path: Path) -> None:
        """Append to the journal of an earlier run, without the line that a kill may have cut."""
        kept = path.read_bytes()
        whole, _, last = kept.rpartition(b"\n")
        try:
            json.loads(last)
            kept += b"\n"  # only its end was cut
        except ValueError:
            kept = whole + b"\n" if whole else b""
        path.write_bytes(kept)
        self.path, self.finished = path, len(read(path)["benchmarks"])

    def keep(self, wanted: str | None, say: Callable[[str], None]) -> None:
        """Where the run ends without pytest's own ending: make the JSON file that was wanted, or say how to make one."""
        if not self.path:
            return
        if wanted:
            write_json(wanted, read(self.path))
            say(f"{self.finished} finished cases: {wanted}")
        else:
            say(f"{self.finished} finished cases: python -m attn_impls journal {self.path} -o run.json")


def read(path: str | Path) -> dict[str, Any]:
    """A journal as the JSON document pytest-benchmark would have written. Raises ValueError with one line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"journal {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is not a journal of this suite: it is not text") from None
    try:
        records = [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError:
        raise ValueError(f"{str(path)!r} is not a journal of this suite: a line is not JSON") from None
    with contextlib.suppress(json.JSONDecodeError):  # a kill may cut the last line, and only that
        records += [json.loads(line) for line in lines[-1:]]
    header = records[0].get("header") if records and isinstance(records[0], dict) else None
    if not isinstance(header, dict):
        raise ValueError(f"{str(path)!r} is not a journal of this suite: its first line has no header")
    if not all(
        isinstance(record, dict) and ("stats" in record or isinstance(record.get("not_run"), dict)) for record in records[1:]
    ):
        raise ValueError(f"{str(path)!r} is not a journal of this suite: a line is not a benchmark")
    benchmarks = [record for record in records[1:] if "stats" in record]
    document = {**header, "benchmarks": benchmarks}
    if "not_run" in header:
        cells = {_cell(record["not_run"]): record["not_run"] for record in records[1:] if "not_run" in record}
        finished = {_cell(benchmark.get("extra_info", {})) for benchmark in benchmarks}  # by a run that went on
        document["not_run"] = [cell for key, cell in cells.items() if key not in finished]
    return document


def _cell(facts: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(facts.get(name) for name in ("workload", "direction", "form", "implementation"))


def conditions(path: str | Path) -> dict[str, Any]:
    """What was written beside the header of a journal that `read` has accepted."""
    with Path(path).open(encoding="utf-8") as file:
        return {name: value for name, value in json.loads(file.readline()).items() if name != "header"}


def write_json(path: str | Path, document: dict[str, Any]) -> None:
    """Write the document whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(document, indent=4, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
