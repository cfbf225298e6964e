"""python -m attn_impls compare: a row a case, then one line that says what came out. For a terminal, or as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple

from . import saved
from .evidence import CONFIDENCE, DEFAULT_FLOOR, MIN_PAIRS, SAME
from .pairing import VERDICTS, Comparison, Row, compare, percent
from .summary import significant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN.json", help="one pair: the baseline, then the candidate")
    parser.add_argument("--baseline", nargs="+", default=[], metavar="A.json", help="several pairs: the first of each")
    parser.add_argument("--candidate", nargs="+", default=[], metavar="B.json", help="the second of each, in the same order")
    add_judging(parser)


def add_judging(parser: argparse.ArgumentParser) -> None:
    """The options that `gate` has too."""
    default = 100 * DEFAULT_FLOOR
    parser.add_argument(
        "--floor",
        type=floor,
        default=DEFAULT_FLOOR,
        metavar="PERCENT",
        help=f"changes below it do not count (default: {default:g})",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")


def command(given: argparse.Namespace) -> int:
    """0: nothing regressed; 1: something did; 2: it cannot be told. Raises ValueError where nothing can be compared."""
    baselines, candidates = given.baseline, given.candidate
    if len(given.runs) == 2 and not baselines and not candidates:
        baselines, candidates = given.runs[:1], given.runs[1:]
    elif given.runs or not baselines or len(baselines) != len(candidates):
        raise ValueError("give A.json B.json, or as many files with --baseline as with --candidate")
    found = compare([saved.read(path) for path in baselines], [saved.read(path) for path in candidates], given.floor)
    print("\n".join((markdown if given.markdown else text)(found)))
    return found.code


def floor(text: str) -> float:
    """A percentage of the command line as a share."""
    share = float(text.removesuffix("%")) / 100
    if not 0 < share < 1:
        raise ValueError
    return share


class Column(NamedTuple):
    title: str
    cell: Callable[[Row], str]
    left: bool = True


def columns(comparison: Comparison) -> list[Column]:
    bounds = f" [{100 * CONFIDENCE:.0f} % bounds]" if comparison.pairs >= MIN_PAIRS else ""
    return [
        Column("verdict", lambda row: row.verdict),
        Column("workload", lambda row: row.key.workload),
        Column("implementation", lambda row: str(row.key)),
        Column("baseline", lambda row: _time(row.seconds[0]), False),
        Column("candidate", lambda row: _time(row.seconds[1]), False),
        Column(f"change{bounds}", _change, False),
        Column("judged by", lambda row: row.basis),
        Column("pairs", lambda row: str(row.pairs or "–"), False),
        Column("", lambda row: row.reason),
    ]


def text(comparison: Comparison) -> Iterable[str]:
    shown = columns(comparison)
    cells = [[column.title for column in shown], *([column.cell(row) for column in shown] for row in comparison.rows)]
    sizes = [max(len(line[n]) for line in cells) for n in range(len(shown))]
    for line in cells:
        parts = (c.ljust(size) if column.left else c.rjust(size) for c, size, column in zip(line, sizes, shown, strict=True))
        yield "  ".join(parts).rstrip()
    yield ""
    yield from comparison.notes
    yield summary(comparison)


def markdown(comparison: Comparison) -> Iterable[str]:
    """The same for a pull request: what changed or could not be told in full, what stayed the same folded away."""
    shown = columns(comparison)
    head = ["| " + " | ".join(column.title for column in shown) + " |"]
    head.append("|" + "|".join("---" if column.left else "--:" for column in shown) + "|")
    lines = {row.key: "| " + " | ".join(_escaped(column.cell(row)) for column in shown) + " |" for row in comparison.rows}
    quiet = [row for row in comparison.rows if row.verdict == SAME]
    loud = [row for row in comparison.rows if row.verdict != SAME]
    yield f"**{summary(comparison)}**"
    yield ""
    for note in comparison.notes:
        yield from (_escaped(note), "")
    if loud:
        yield from (*head, *(lines[row.key] for row in loud), "")
    if quiet:
        yield from (
            f"<details><summary>{len(quiet)} SAME</summary>",
            "",
            *head,
            *(lines[row.key] for row in quiet),
            "",
            "</details>",
        )


def summary(comparison: Comparison) -> str:
    counts = ", ".join(f"{len(comparison.of(verdict))} {verdict}" for verdict in VERDICTS)
    pairs = f"{comparison.pairs} pair{'s' * (comparison.pairs != 1)}"
    interval = "" if comparison.pairs >= MIN_PAIRS else ", no interval"
    controls = [f"{dtype} matmul {percent(found.change)}" for dtype, found in comparison.controls.items()]
    parts = [counts, f"floor {100 * comparison.floor:.3g} %", pairs + interval, *controls]
    if comparison.moved:
        parts.append("the machine itself moved")
    return " · ".join(parts)


def _change(row: Row) -> str:
    found = row.evidence
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return percent(found.change)
    return f"{percent(found.change)} [{percent(found.low)[:-2]}, {percent(found.high)[:-2]}]"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{significant(seconds * 1e3)} ms" if seconds >= 1e-4 else f"{significant(seconds * 1e6)} µs"


def _escaped(text: str) -> str:
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " ")):
        text = text.replace(old, new)
    return text
