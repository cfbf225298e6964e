"""--resume: a run goes on from the journal of one that was killed. What is finished there is not run again.

A finished case goes through benchmark.pedantic once more, with a timer that plays its recorded rounds back. So
pytest-benchmark knows it like any other: in its table, in --benchmark-json, in saved runs and in comparisons.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..registry import Implementation
from . import environment, journal, workers
from .options import NEWEST
from .selection import Selection

PACKAGE = Path(__file__).resolve().parents[1]
# facts of a machine that must be as they were, beside the device
MACHINE = ("torch", "triton", "cuda", "cudnn", "driver", "threads", "gpu_count", "python_version", "world_size")


class Resumed:
    """The finished cases of an earlier run, by test id."""

    def __init__(self, path: Path, benchmarks: list[dict[str, Any]]):
        self.path = path
        self.cases = {benchmark["fullname"]: benchmark for benchmark in benchmarks}
        self.taken: set[str] = set()  # those that this run's selection held
        self._readings: Iterator[float] = iter(())
        self.playing = False

    def read_timer(self) -> float:
        return next(self._readings)

    def play(self, benchmark: Any) -> dict[str, Any] | None:
        """pytest-benchmark's dict of the case, after it has been told; None for a case that is still to be run."""
        case = self.cases.get(benchmark.fullname) if benchmark.enabled else None
        if case is None:
            return None
        rounds = case["stats"]["data"]
        # read before and after each round; 0 before, so that the difference is the recorded number to the bit
        self._readings = iter([reading for seconds in rounds for reading in (0.0, seconds)])
        self.playing = True
        try:
            benchmark.pedantic(_nothing, rounds=len(rounds))
        finally:
            self.playing = False
        benchmark.stats.params = case["params"]
        benchmark.extra_info.update(case["extra_info"], resumed=True)
        self.taken.add(benchmark.fullname)
        return benchmark.stats.as_dict()

    def describe(self) -> str:
        return f"resuming {self.path.name}: {len(self.cases)} finished cases in it are not run again"


def _nothing() -> None:
    pass


def find(config: pytest.Config, session: Any) -> Resumed | None:
    """What --resume asks for, None without it. Raises pytest.UsageError where its results may not be mixed with this run's."""
    wanted = config.getoption("resume")
    if wanted is None:
        return None
    if session.ranks:
        raise pytest.UsageError(
            "--resume does not go with torchrun: leave it out, and select what is missing with --workload or --form"
        )
    if workers.in_parallel(config):
        raise pytest.UsageError(f"--resume: {workers.REASON}")
    try:
        path = _path(wanted, session.journal.folder)
        document = journal.read(path)
        if difference := _difference(document, journal.conditions(path), session):
            raise ValueError(
                f"{path.name} {difference}, so its results would not belong to this run; start again without --resume"
            )
        resumed = Resumed(path, document["benchmarks"])
    except ValueError as error:
        raise pytest.UsageError(f"--resume: {error}") from None
    except (KeyError, TypeError):
        raise pytest.UsageError(f"--resume: {wanted!r} is not a journal of this suite: a line lacks its rounds") from None
    session.journal.go_on(path)
    return resumed


def _path(wanted: str, folder: Path) -> Path:
    if wanted != NEWEST:
        return Path(wanted)
    known = sorted(folder.glob("*.jsonl"))
    if not known:
        raise ValueError(f"there is no journal in {folder.name!r}; a run that finished no case leaves none")
    return known[-1]


def _difference(document: dict[str, Any], conditions: dict[str, Any], session: Any) -> str:
    """How the journal's run differs from this one in what its numbers depend on, or ""."""
    then, now = document["machine_info"], json.loads(json.dumps(session.header["machine_info"], default=str))
    if environment.same_device(now, then):
        return f"was made on {then.get('gpu') or then.get('cpu', {}).get('brand_raw', 'an unknown CPU')}"
    facts = [(name, then.get(name), now.get(name)) for name in MACHINE]
    facts += [(name, old, now["libraries"].get(name, old)) for name, old in then.get("libraries", {}).items()]
    facts.append(("commit", document["commit_info"].get("id"), session.header["commit_info"].get("id")))
    options, package, sources = (conditions.get(name) for name in ("options", "package", "sources"))
    if options is None or package is None or sources is None:
        return "does not say with which options and sources it was made"
    mine = here(session.selection)
    facts += [(f"--{name.replace('_', '-')}", old, mine["options"].get(name)) for name, old in options.items()]
    for name, old, new in facts:
        if old != new:
            return f"was made with {name} {'not given' if old is None else old}, now {'not given' if new is None else new}"
    if package != mine["package"]:
        return f"was made before the source of {PACKAGE.name} changed"
    changed = [name for name, digest in sources.items() if mine["sources"].get(name, digest) != digest]
    return f"was made before the source of {changed[0]!r} changed" if changed else ""


def here(selection: Selection) -> dict[str, Any]:
    """What else this run's numbers depend on: options, this package, implementations from elsewhere. Stored in its journal."""
    options = {"device": selection.device, "rounds": selection.rounds, "warmup_rounds": selection.warmup_rounds}
    options["seed"] = selection.seed
    return {"options": options, "package": _package(), "sources": _sources(selection.implementations)}


def _package() -> str:
    """A digest of the sources of this package: a commit's id does not tell what has been edited since."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        with contextlib.suppress(OSError):  # an editor's lock is a link to nowhere
            source = path.read_bytes()
            digest.update(f"{path.relative_to(PACKAGE)} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:16]


def _sources(implementations: Iterable[Implementation]) -> dict[str, str]:
    """A digest of the file of each implementation that is not this package's."""
    found = {}
    for implementation in implementations:
        path = Path(implementation.source).resolve()
        if PACKAGE not in path.parents:
            with contextlib.suppress(OSError):
                found[implementation.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found
