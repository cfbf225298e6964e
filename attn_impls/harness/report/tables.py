"""The report's tables as plain text cells, for the page and for Markdown alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..summary import CLOSE, significant
from .load import HOW, Row, Run, newest

NOISY = 0.1


class Record(NamedTuple):
    """A line of a table, and what the filters know it by ("" is always shown)."""

    cells: tuple[str, ...]
    workload: str = ""
    implementation: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Columns whose title begins with "<" are text; the others are numbers, set to the right."""

    columns: tuple[str, ...]
    records: list[Record]
    note: str = ""

    @property
    def titles(self) -> list[str]:
        return [column.removeprefix("<") for column in self.columns]

    @property
    def text(self) -> list[bool]:
        return [column.startswith("<") for column in self.columns]


@dataclass(frozen=True)
class Section:
    """Rows that may be compared: one device, one direction, one process or several ranks."""

    device: str
    direction: str
    spread: bool
    rows: list[Row] = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.device} · {self.direction}" + (" · several ranks" if self.spread else "")

    @property
    def workloads(self) -> dict[str, list[Row]]:
        """Each workload's rows, fastest first, in the order of the runs."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["workload"], []).append(row)
        return {workload: sorted(rows, key=lambda row: row["ms"]) for workload, rows in found.items()}


def sections(runs: list[Run]) -> list[Section]:
    found: dict[tuple[str, str, bool], list[Row]] = {}
    for row in newest(runs):
        found.setdefault((row["device"], row["direction"], "form" in row), []).append(row)
    return [Section(*key, _told_apart(rows) if key[2] else rows) for key, rows in found.items()]


def _told_apart(rows: list[Row]) -> list[Row]:
    """The rows with a "variant": the form, with those options that it was not always run with alike."""
    ways: dict[str, list[Row]] = {}
    for row in rows:
        ways.setdefault(row["form"], []).append(row)
    differing = {form: [key for key in HOW if len({row[key] for row in alike}) > 1] for form, alike in ways.items()}

    def variant(row: Row) -> str:
        said = "; ".join(f"{key} {row[key]}" for key in differing[row["form"]] if row[key])
        return f"{row['form']} ({said})" if said else row["form"]

    return [row | {"variant": variant(row)} for row in rows]


def doubts(section: Section) -> list[str]:
    """What a reader must know before believing the section's times."""
    found = []
    beyond = sum((row["percent"] or 0) > 100 and "≈" not in row["flags"] for row in section.rows)
    if beyond:
        found.append(f"{beyond} cases beat the measured limit: the machine was busy while its ceiling was measured")
    noisy = sum((row["q3"] - row["q1"]) > NOISY * row["ms"] for row in section.rows)
    if noisy:
        found.append(f"{noisy} of {len(section.rows)} cases have quartiles more than {100 * NOISY:.0f} % apart: a busy machine?")
    return found


def name(row: Row) -> str:
    arrow = f" → {row['chosen']}" if row["chosen"] else ""
    return row["implementation"] + arrow + (f" {row['flags']}" if row["flags"] else "")


def title(row: Row) -> str:
    return row["workload"] + (f" ({row['label']})" if row["label"] else "")


def leaders(rows: list[Row]) -> list[Row]:
    """The fastest, and the rows too near to it to be told apart: by medians, by rounds paired with SDPA's, or by quartiles."""
    best = rows[0]

    def behind(row: Row) -> float:
        paired = [one["vs_sdpa"] for one in (best, row)]
        return min(row["ms"] / best["ms"], paired[0] / paired[1] if all(paired) else math.inf) - 1

    return [best, *(row for row in rows[1:] if behind(row) < CLOSE or row["q1"] <= best["q3"])]


def winners(section: Section) -> Table:
    """The fastest of each workload (of each form, on several ranks), and who is too near to be told apart."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in section.rows:
        groups.setdefault((row["workload"], row.get("variant"), row.get("world_size")), []).append(row)
    records = [_winner(sorted(rows, key=lambda row: row["ms"]), section.spread) for rows in groups.values()]
    who = ("<workload", "<form", "ranks", "<fastest") if section.spread else ("<workload", "<fastest")
    what = ("time", "efficiency") if section.spread else ("time", "rate", "% limit", "vs sdpa [95 % CI]")
    note = (
        f"≈: too near to call: less than {100 * CLOSE:.0f} % behind in median time or in speed-up over SDPA of the same rounds, "
        "or the quartiles overlap."
    )
    return Table((*who, *what, "<next"), records, note)


def _winner(rows: list[Row], spread: bool) -> Record:
    best, *others = rows
    near = leaders(rows)[1:]
    following = f"{name(others[0])} ({_behind(others[0]['ms'] / best['ms'])})" if others else "–"
    following = "≈ " + ", ".join(name(row) for row in near) if near else following
    who = (best["variant"], str(best["world_size"])) if spread else ()
    what = (percent(best["efficiency"]),) if spread else (rate(best), percent(best["percent"]), versus(best))
    return Record((title(best), *who, name(best), milliseconds(best["ms"]), *what, following), best["workload"])


def _behind(times: float) -> str:
    return f"+{100 * (times - 1):.1f} %" if times < 2 else f"{significant(times)} ×"


def ranking(section: Section) -> Table | None:
    """Geometric means over the workloads that all ranked implementations share; None where there is nothing to rank.

    Who ran on fewer than half of the workloads is not ranked: it would shrink what the others are compared on.
    """
    by_name: dict[str, dict[str, Row]] = {}
    for row in section.rows:
        by_name.setdefault(row["implementation"], {})[row["workload"]] = row
    total = len(section.workloads)
    ranked = {one: rows for one, rows in by_name.items() if 2 * len(rows) >= total}
    ranked = ranked if len(ranked) > 1 else dict(by_name)
    while not (shared := _shared(ranked)) and len(ranked) > 1:
        del ranked[min(ranked, key=lambda one: sum(w in rows for w in ranked[one] for rows in ranked.values()))]
    if section.spread or len(ranked) < 2:
        return None
    paired = all(ranked[one][w]["vs_sdpa"] for one in ranked for w in shared)
    fastest = {w: min(rows[w]["ms"] for rows in ranked.values()) for w in shared}

    def mean(rows: dict[str, Row]) -> float:
        return statistics.geometric_mean(rows[w]["vs_sdpa"] if paired else fastest[w] / rows[w]["ms"] for w in shared)

    means = {one: mean(rows) for one, rows in ranked.items()}
    first = [row["implementation"] for rows in section.workloads.values() for row in leaders(rows)]
    records = [
        Record((str(n), one, f"{ratio(means[one])}×", f"{first.count(one)}", f"{len(by_name[one])} of {total}"), "", one)
        for n, one in enumerate(sorted(means, key=means.__getitem__, reverse=True), 1)
    ]
    left = [one for one in by_name if one not in ranked]
    which = f"the {len(shared)} of {total} workloads that all of these have: {', '.join(shared)}"
    over = f"Geometric mean over {which if len(shared) < total else f'all {total} workloads'}."
    without = f" Not ranked, on too few workloads: {', '.join(f'{one} ({len(by_name[one])})' for one in left)}." if left else ""
    measure = "vs sdpa" if paired else "vs fastest"
    return Table(("rank", "<implementation", measure, "fastest or ≈ on", "ran on"), records, over + without)


def _shared(ranked: dict[str, dict[str, Row]]) -> list[str]:
    workloads: dict[str, None] = {w: None for rows in ranked.values() for w in rows}
    return [w for w in workloads if all(w in rows for rows in ranked.values())]


def cases(section: Section) -> Table:
    """Every case, workload by workload, fastest first."""
    columns = SPREAD if section.spread else SINGLE
    seen: set[tuple[Any, ...]] = set()
    records = []
    for rows in section.workloads.values():
        for row in sorted(rows, key=lambda row: str(row.get("variant", ""))):  # stable: fastest first within
            group = (row["workload"], row.get("variant"), row.get("world_size"))
            cells = tuple(cell(row) for _, cell in columns)
            records.append(Record(cells, row["workload"], row["implementation"], group not in seen))
            seen.add(group)
    return Table(tuple(column for column, _ in columns), records, LEGEND)


def milliseconds(ms: float) -> str:
    return f"{significant(ms)} ms" if ms >= 0.1 else f"{significant(ms * 1e3)} µs"


def number(x: float | None) -> str:
    return "–" if x is None else significant(x)


def rate(row: Row) -> str:
    """What the workload's limit is reckoned in: GB/s where memory is the limit, else TFLOP/s."""
    if row["limit_bound"] == "memory" and row.get("gb_per_s") is not None:
        return f"{number(row['gb_per_s'])} GB/s"
    return "–" if row.get("tflops") is None else f"{number(row['tflops'])} TFLOP/s"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g} %" if x < 1 else f"{x:.0f} %"


def ratio(x: float) -> str:
    return f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def versus(row: Row) -> str:
    """The paired speed-up with its interval, which needs no saying where it is not wider than what is shown."""
    if row["implementation"] == "sdpa":
        return "baseline"
    value, low, high = (row[key] for key in ("vs_sdpa", "vs_low", "vs_high"))
    if value is None:
        return "–"
    return f"{ratio(value)}×" if None in (low, high) else f"{ratio(value)}× [{ratio(low)}, {ratio(high)}]"


def _speedup(row: Row) -> str:
    return "–" if row["speedup"] is None else f"{row['speedup']:.2f}×"


def _limit(row: Row) -> str:
    return "–" if row["limit_ms"] is None else f"{milliseconds(row['limit_ms'])} ({row['limit_bound']})"


_TIME: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("time", lambda row: milliseconds(row["ms"])),
    ("IQR", lambda row: f"{100 * (row['q3'] - row['q1']) / row['ms']:.1f} %"),
)
SINGLE: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("<workload", title),
    ("<implementation", name),
    *_TIME,
    ("rate", rate),
    ("limit", _limit),
    ("% limit", lambda row: percent(row["percent"])),
    ("vs sdpa [95 % CI]", versus),
    ("host µs", lambda row: number(row["host_us"])),
    ("peak MiB", lambda row: number(row["peak_mib"])),
    ("error", lambda row: number(row["error"])),
)
SPREAD: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("<workload", title),
    ("<form", lambda row: row["variant"]),
    ("ranks", lambda row: str(row["world_size"])),
    ("<implementation", name),
    *_TIME,
    ("speed-up", _speedup),
    ("efficiency", lambda row: percent(row["efficiency"])),
    ("exposed", lambda row: "–" if row["exposed_ms"] is None else f"{significant(row['exposed_ms'])} ms"),
    ("% bound", lambda row: percent(row["bound_percent"])),
    ("imbalance", lambda row: "–" if row["imbalance"] is None else f"{row['imbalance']:.3f}"),
    ("error", lambda row: number(row["error"])),
)
LEGEND = (
    "Time: median over the rounds. Error: worst row against float64, as a share of what its dtype excuses (up to 1 passes). "
    "→ the kernel that a dispatching library chose. ! the time includes the host's. ~ unsteady SM clock. ≈ approximate kernel."
)
