"""python -m attn_impls: what the suite can do without running anything."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .harness import compare, environment, gate, journal, matrix, mutation, summary
from .harness.report import command as report
from .presets import PRESETS
from .registry import DEVICES, discover
from .workload import DTYPES, Workload


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attn_impls", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("journal", help="turn the journal of a run that did not finish into pytest-benchmark's JSON")
    command.add_argument("journal", metavar="JOURNAL.jsonl")
    command.add_argument("-o", "--output", required=True, metavar="RUN.json")
    command = commands.add_parser("show", help="print the table of a saved run")
    command.add_argument("run", metavar="RUN.json")
    report.add_arguments(commands.add_parser("report", help="make a report of saved runs: HTML, Markdown, charts"))
    commands.add_parser("list", help="list the presets and the implementations")
    command = commands.add_parser("mutants", help="judge deliberately broken kernels, and the implementations at hand")
    command.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    command.add_argument("--workload", metavar="ID", action="append", help="repeat for more; default: twelve small ones")
    compare.add_arguments(commands.add_parser("compare", help="a verdict a case on two saved runs, or on several pairs of them"))
    gate.add_arguments(commands.add_parser("gate", help="run two versions alternately: has any case become slower?"))
    given = parser.parse_args(arguments)
    try:
        return COMMANDS[given.command](given) or 0
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"python -m attn_impls {given.command}: {error}", file=sys.stderr)
        return 2


def _journal(given: argparse.Namespace) -> None:
    document = journal.read(given.journal)
    journal.write_json(given.output, document)
    print(f"{len(document['benchmarks'])} finished cases: {given.output}")


def _show(given: argparse.Namespace) -> None:
    try:
        document = json.loads(Path(given.run).read_text(encoding="utf-8"))
        ours = [benchmark for benchmark in document["benchmarks"] if "workload" in benchmark["extra_info"]]
        lines = _table(ours, document.get("not_run") or [], document["machine_info"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{given.run!r} is not a JSON file of pytest-benchmark") from None
    if not ours:
        raise ValueError(f"{given.run!r} holds no result of this suite")
    for line in lines:
        print(line.text)


def _table(ours: list[summary.Benchmark], cells: list[dict[str, str]], info: dict[str, Any]) -> list[summary.Line]:
    """What ended the run. cells: its document's "not_run", as Session.not_run has them."""
    machine, width = environment.describe(info, {}), shutil.get_terminal_size().columns
    if ours and "form" in ours[0]["extra_info"]:
        return matrix.render(ours, matrix.reasons(cells), [*machine, matrix.describe(info)], width)
    return summary.render(ours, summary.reasons(cells), machine, width)


def _list(given: argparse.Namespace) -> None:  # noqa: ARG001  (the commands share a signature)
    print("presets")
    for name, (identity, source) in PRESETS.items():
        print(f"  {name:<26} {identity:<54} {source}")
    print("implementations")
    for implementation in discover().values():
        reason = "" if not implementation.dists or implementation.dist else implementation.unavailable(implementation.devices[0])
        library = f"{implementation.dist or 'torch'} {implementation.version}".strip()
        print(f"  {implementation.name:<26} {reason or library}")


def _mutants(given: argparse.Namespace) -> int:
    """1 where a mutant survives or something right is rejected."""
    workloads = [Workload.parse(text) for text in given.workload or ()]
    workloads = workloads or [w.replace(dtype=DTYPES[given.dtype]) for w in mutation.WORKLOADS]
    discover()
    fit = True
    for title, kind in (("outputs", mutation.Bench), ("gradients", mutation.GradientBench)):
        print(f"{title}:", flush=True)
        lines = list(mutation.report(workloads, given.device, mutation.available(given.device), kind))
        print("\n".join(lines), flush=True)
        accepted = any(line.startswith("false rejections: 0 ") and line.endswith("; 0 mutants that are right") for line in lines)
        fit &= accepted and not lines[-1].startswith("SURVIVED")
    return int(not fit)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "journal": _journal,
    "show": _show,
    "list": _list,
    "mutants": _mutants,
    "compare": compare.command,
    "gate": gate.command,
    "report": report.run,
}

if __name__ == "__main__":
    sys.exit(main())
