"""The tables as GitHub's Markdown, for a pull request or a job's summary."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import circumstances, tables
from .load import Run
from .tables import Table


def render(runs: list[Run]) -> str:
    return "\n".join(_lines(runs))


def _lines(runs: list[Run]) -> Iterator[str]:
    for section in tables.sections(runs):
        yield f"### {escaped(section.title)}"
        yield from (f"\n**{escaped(doubt)}**" for doubt in tables.doubts(section))
        yield from ("", *_table(tables.winners(section)), "")
        if ranking := tables.ranking(section):
            yield from _folded("Ranking", ranking)
        yield from _folded(f"All {len(section.rows)} cases", tables.cases(section))
    missing = circumstances.missing(runs)
    if missing.records:
        yield from _folded(f"Did not run: {len({record.implementation for record in missing.records})} implementations", missing)
    yield from _folded("Environment", circumstances.environment(runs))


def _folded(title: str, table: Table) -> Iterator[str]:
    yield from (f"<details><summary>{title}</summary>", "", *_table(table), "", "</details>", "")


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(escaped, table.titles))} |"
    yield f"|{'|'.join('---' if text else '--:' for text in table.text)}|"
    for record in table.records:
        yield f"| {' | '.join(map(escaped, record.cells))} |"
    if table.note:
        yield from ("", escaped(table.note))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~@])", r"\\\1", " ".join(text.split()))
