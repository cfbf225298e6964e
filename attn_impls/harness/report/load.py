"""Saved runs as flat rows: what pytest-benchmark's JSON holds, checked, in the units that a reader sees."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...workload import Workload

Row = dict[str, Any]  # one case of one run
HOW = ("chunks", "along", "streams")  # the --overlap- options with which a form was run
# what makes two rows the same case
CASE = ("device", "direction", "workload", "implementation", "form", "world_size", *HOW, "heads")
WHERE = ("workload", "implementation", "direction", "form")  # what a case is called within its run


@dataclass(frozen=True)
class Run:
    """One JSON file. `missing`: cases without a result, each with its reason, or None where the file stores no reasons."""

    name: str
    when: str
    device: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    version: str
    rows: list[Row]
    missing: list[dict[str, str]] | None

    @property
    def commit_text(self) -> str:
        identity = str(self.commit.get("id") or "unknown")
        known = re.fullmatch("[0-9a-f]{12,}", identity)
        return (identity[:12] if known else identity) + (", with local changes" if self.commit.get("dirty") else "")


def load(paths: Iterable[str]) -> list[Run]:
    """The runs of these files, oldest first. Raises ValueError with one line that says which file is wrong, and how."""
    given = list(paths)
    if twice := {path for path in given if given.count(path) > 1}:
        raise ValueError(f"{min(twice)!r} is given twice")
    names = [Path(path).stem for path in given]
    if len(set(names)) < len(names):
        names = [str(Path(path).with_suffix("")) for path in given]
    runs = [_run(path, name) for path, name in zip(given, names, strict=True)]
    return sorted(runs, key=lambda run: run.when)


def _run(path: str, name: str) -> Run:
    document = _document(path)
    machine = document["machine_info"]
    device = _device(machine)
    rows = []
    for n, benchmark in enumerate(document["benchmarks"], 1):
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        if not isinstance(info, dict) or "workload" not in info:
            continue  # another suite's
        try:
            rows.append(_row(info, benchmark["stats"]) | {"run": name, "device": device})
        except KeyError as error:
            raise ValueError(f"{path!r}: benchmark {n} lacks {error}: made by another version of this suite?") from None
        except (TypeError, AttributeError, ArithmeticError):
            raise ValueError(f"{path!r}: benchmark {n} is malformed: made by another version of this suite?") from None
        except ValueError as error:
            raise ValueError(f"{path!r}: benchmark {n}: {error}") from None
    missing = document.get("not_run")
    if not rows:
        raise ValueError(f"{path!r} holds no result of this suite")
    for row in rows:
        row["when"] = str(document.get("datetime", ""))[:19].replace("T", " ")
    return Run(
        name,
        rows[0]["when"],
        device,
        machine,
        document.get("commit_info") or {},
        str(document.get("version", "")),
        rows,
        None if missing is None else [_missing(path, cell) for cell in missing],
    )


def _document(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path!r} is not JSON: it is not text") from None
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{path!r} is empty: its run ended before it could save anything")
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path!r} is cut off, or not JSON{where}") from None
    expected = {"benchmarks": list, "machine_info": dict}
    if not isinstance(document, dict) or not all(isinstance(document.get(k), kind) for k, kind in expected.items()):
        raise ValueError(f"{path!r} is not a JSON file of pytest-benchmark")
    if not isinstance(document.get("commit_info") or {}, dict) or not isinstance(document.get("not_run") or [], list):
        raise ValueError(f"{path!r} is not a JSON file of pytest-benchmark")
    return document


def _device(machine: dict[str, Any]) -> str:
    """What a time depends on most: the GPU, or the CPU and its threads."""
    if machine.get("gpu"):
        return str(machine["gpu"])
    cpu = machine.get("cpu")
    brand = cpu.get("brand_raw") if isinstance(cpu, dict) else None
    threads = machine.get("threads")
    return f"CPU: {brand or machine.get('machine') or 'unknown'}" + (f", {threads} threads" if threads else "")


def _missing(path: str, cell: Any) -> dict[str, str]:
    if not isinstance(cell, dict) or not all(cell.get(key) for key in ("workload", "implementation", "reason")):
        raise ValueError(f"{path!r}: an entry of not_run lacks workload, implementation or reason")
    name = str(cell["implementation"])
    found = {key: str(cell[key]) for key in WHERE if cell.get(key)}
    return found | {"reason": " ".join(str(cell["reason"]).removeprefix(f"{name}: ").split())}


def _row(info: dict[str, Any], stats: dict[str, Any]) -> Row:
    """One case. Times in ms (host and device times also in µs), rates in TFLOP/s, percentages in percent."""
    w = Workload.parse(info["workload"])

    def number(key: str, factor: float = 1.0) -> float | None:
        return _number(info[key], key, factor) if info.get(key) is not None else None

    ms, low, high = (_time(stats[key], key) for key in ("median", "q1", "q3"))
    flops, bytes_, limit = number("flops"), number("bytes"), number("limit_s", 1e3)
    chosen = str(info.get("chosen") or "")
    row: Row = {
        "workload": str(w),
        "label": str(info.get("label") or ""),
        "implementation": str(info["implementation"]),
        "chosen": chosen,
        "direction": str(info.get("direction") or "forward"),
        "family": _family(str(w)),
        "length": w.kv_len,
        "dtype": str(w).rpartition("-")[2],
        "library": f"{info.get('library', '')} {info.get('library_version', '')}".strip(),
        "timer": str(info.get("timer") or ""),
        "ms": ms,
        "q1": low,
        "q3": high,
        "rounds": _number(stats["rounds"], "rounds"),
        "us": ms * 1e3,
        "host_us": number("host_us"),
        "limit_ms": limit,
        "limit_bound": str(info.get("limit_bound") or ""),
        "limit_source": str(info.get("limit_source") or ""),
        "percent": number("percent_of_limit"),
        "error": number("error_over_budget"),
        "peak_mib": number("peak_bytes", 2**-20),
        "vs_sdpa": number("vs_sdpa"),
        "vs_low": number("vs_sdpa_ci_low"),
        "vs_high": number("vs_sdpa_ci_high"),
        "flags": _flags(info),
    }
    if flops:
        row |= {"tflops": flops / ms / 1e9, "tflops_low": flops / high / 1e9, "tflops_high": flops / low / 1e9}
        row |= {"intensity": bytes_ and flops / bytes_, "limit_tflops": limit and flops / limit / 1e9}
    if bytes_:
        row["gb_per_s"] = bytes_ / ms / 1e6
    for source in ("datasheet", "ceiling"):
        row |= {f"{source}_{rate}": number(f"{source}_{rate}") for rate in ("tflops", "tb_per_s")}
    if info.get("form"):
        row |= _spread(info, number, ms)
    return row


def _spread(info: dict[str, Any], number: Any, ms: float) -> Row:
    """What a case of several ranks has besides; its ms is the makespan."""
    size = _number(info["world_size"], "world_size")
    low, high = number("speedup_ci_low"), number("speedup_ci_high")
    exposed = number("exposed_s", 1e3)
    padded = info.get("pad_heads", (number("padding_bound") or 1) < 1)
    return {
        "form": str(info["form"]),
        "world_size": int(size),
        "chunks": _listed(info.get("overlap_chunks")),
        "along": _listed(info.get("overlap_along")),
        "streams": _listed(info.get("overlap_streams")),
        "heads": "padded" if padded else "",
        "efficiency": number("efficiency", 100),
        "efficiency_low": low and 100 * low / size,
        "efficiency_high": high and 100 * high / size,
        "speedup": number("speedup"),
        "exposed_ms": exposed,
        "hidden_ms": None if exposed is None else max(0.0, ms - exposed),
        "bound_percent": number("percent_of_bound"),
        "imbalance": number("imbalance"),
    }


def _listed(value: Any) -> str:
    """An option as it is given; "" where it does not concern the form, or an older file does not have it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _family(identity: str) -> str:
    """The workload's id with its length left open: the workloads that one line of a chart joins."""
    return re.sub(r"^([^-]+-[^-]+-)(s|q\d+kv)\d+", r"\1\2*", identity)


def _flags(info: dict[str, Any]) -> str:
    marks = (("host_bound", "!"), ("sm_clock_unsteady", "~"), ("approximate", "≈"))
    return "".join(mark for key, mark in marks if info.get(key))


def _time(seconds: Any, key: str) -> float:
    """Milliseconds."""
    found = _number(seconds, key, 1e3)
    if found <= 0:
        raise ValueError(f"{key} is {seconds!r}: a time is above 0")
    return found


def _number(value: Any, key: str, factor: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}: a number was expected")
    return value * factor


def newest(runs: Iterable[Run]) -> list[Row]:
    """The rows of all runs; of a case that ran more than once, the newest."""
    found: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.rows:
            found[identity(row)] = row
    return list(found.values())


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in CASE)
