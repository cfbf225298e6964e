"""What surrounds the numbers: which cases have none and why, and the machines and versions that gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .load import Row, Run
from .tables import Record, Table


def missing(runs: list[Run]) -> Table:
    """Each implementation that has no result somewhere, with the reason; what is missing for one reason stands once."""
    places: dict[tuple[str, ...], dict[str, None]] = {}
    everywhere: dict[str, set[str]] = {}
    for run in runs:
        everywhere.setdefault(run.device, set()).update(map(_place, run.rows))
        for cell in _missing(run):
            everywhere[run.device].add(_place(cell))
            places.setdefault((cell["implementation"], run.device, cell["reason"]), {})[_place(cell)] = None
    records = [
        Record((one, reason, "everywhere" if set(where) == everywhere[device] else _first(list(where)), device), "", one)
        for (one, device, reason), where in sorted(places.items())
    ]
    return Table(("<implementation", "<reason", "<where", "<device"), records)


def _place(cell: Row) -> str:
    direction = cell.get("direction", "forward")
    return " ".join(filter(None, (cell["workload"], cell.get("form"), direction if direction != "forward" else "")))


def _first(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _missing(run: Run) -> list[dict[str, str]]:
    if run.missing is not None:
        return run.missing
    there = {(row["workload"], row["implementation"], row.get("form", ""), row["direction"]) for row in run.rows}
    names = dict.fromkeys(row["implementation"] for row in run.rows)
    cells = dict.fromkeys((row["workload"], row.get("form", ""), row["direction"]) for row in run.rows)
    return [
        {"workload": w, "implementation": one, "form": form, "direction": direction, "reason": UNKNOWN}
        for w, form, direction in cells
        for one in names
        if (w, one, form, direction) not in there
    ]


UNKNOWN = "no result; this older file stores no reasons"


def headlines(runs: list[Run]) -> list[str]:
    """The devices and the versions, each line once."""
    found: dict[str, None] = {}
    for run in runs:
        info = run.machine
        driver = [
            f"{what} {info[key]}" for what, key in (("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn")) if info.get(key)
        ]
        versions = [f"{what} {info[what]}" for what in ("torch", "triton") if info.get(what)]
        found[" · ".join([_device(run), *driver])] = None
        found[" · ".join([*versions, *filter(None, [_libraries(run)])])] = None
    return [line for line in found if line]


def environment(runs: list[Run]) -> Table:
    """What gave the numbers, a column for each run."""
    cells = {what: [cell(run) for run in runs] for what, cell in ENVIRONMENT}
    records = [Record((what, *(str(cell or "–") for cell in found))) for what, found in cells.items() if any(found)]
    return Table(("<run", *(f"<{run.name}" for run in runs)), records, "; ".join(differences(runs)))


def differences(runs: list[Run]) -> list[str]:
    """What else differs between runs of one device: their cases stand side by side, and this may be why they differ."""
    found = []
    for device in dict.fromkeys(run.device for run in runs):
        machines = [_versions(run) for run in runs if run.device == device]
        for key in dict.fromkeys(key for machine in machines for key in machine):
            values = list(dict.fromkeys(str(machine.get(key) or "none") for machine in machines))
            if len(values) > 1:
                found.append(f"{key} differs on {device}: {' / '.join(values)}")
    return found


def _versions(run: Run) -> dict[str, Any]:
    libraries = run.machine.get("libraries")
    keys = ("torch", "triton", "cuda", "cudnn", "driver")
    return {key: run.machine.get(key) for key in keys} | (libraries if isinstance(libraries, dict) else {})


def _libraries(run: Run) -> str:
    libraries = run.machine.get("libraries")
    return " · ".join(f"{k} {v}" for k, v in libraries.items()) if isinstance(libraries, dict) else ""


def _ranks(run: Run) -> str:
    info = run.machine
    backend = f"{info.get('backend') or ''} {info.get('nccl') or ''}".strip()
    return f"{info['world_size']} ({backend}); {info.get('topology') or ''}".rstrip("; ") if info.get("world_size") else ""


def _device(run: Run) -> str:
    count = run.machine.get("gpu_count") or 0
    return (f"{count} × " if isinstance(count, int) and count > 1 else "") + run.device


ENVIRONMENT: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("date (UTC)", lambda run: run.when),
    ("device", _device),
    ("driver", lambda run: run.machine.get("driver")),
    ("CUDA", lambda run: run.machine.get("cuda")),
    ("cuDNN", lambda run: run.machine.get("cudnn")),
    ("torch", lambda run: run.machine.get("torch")),
    ("triton", lambda run: run.machine.get("triton")),
    ("libraries", _libraries),
    ("ranks", _ranks),
    ("Python", lambda run: run.machine.get("python_version")),
    ("commit", lambda run: run.commit_text),
    ("cases", lambda run: len(run.rows)),
)
