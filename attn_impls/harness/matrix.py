"""The table that ends a distributed run: per workload, form × implementation, and why the other cells are empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..workload import DIRECTIONS
from . import environment, topology
from .summary import Benchmark, Column, Line, marked_name, marks_explained, significant, table, wrapped


def write(reporter: Any, session: Any) -> None:
    """Print the summary of what the ranks measured, on the rank whose reporter shows it."""
    results, cells = session.spreads.results, session.not_run
    if not results and not cells:
        return
    info = session.machine_info | topology.facts(session.ranks)
    machine = [*environment.describe(info, session.state), describe(info)]
    reporter.section(f"attention on {session.ranks.size} ranks", "=", bold=True)
    for line in render(results, reasons(cells), machine, session.config.get_terminal_writer().fullwidth):
        reporter.write_line(line.text, **line.style)


def reasons(cells: Iterable[dict[str, str]]) -> dict[tuple[str, str, str, str], str]:
    """What `render` takes as not_run, of a document's "not_run"."""
    return {(c["workload"], c.get("direction", "forward"), c["form"], c["implementation"]): c["reason"] for c in cells}


def describe(info: dict[str, Any]) -> str:
    nccl = f" {info['nccl']}" if info["nccl"] else ""
    return f"{info['world_size']} ranks · {info['backend']}{nccl} · {info['topology']}"


def render(
    results: list[Benchmark], not_run: dict[tuple[str, str, str, str], str], machine: Iterable[str], width: int
) -> list[Line]:
    lines = [Line(text) for text in machine]
    told = [(b["extra_info"]["workload"], b["extra_info"]["direction"]) for b in results] + [key[:2] for key in not_run]
    workloads = dict.fromkeys(workload for workload, _ in told)  # their directions stand together
    for part in sorted(dict.fromkeys(told), key=lambda part: (list(workloads).index(part[0]), DIRECTIONS.index(part[1]))):
        lines += [Line(""), *_part(part, results, not_run, width)]
    lines += [Line(""), *(Line(text) for text in _legend([b["extra_info"] for b in results]))]
    return [Line(part, line.style) for line in lines for part in wrapped(line.text, width)]


def _part(
    part: tuple[str, str], results: list[Benchmark], not_run: dict[tuple[str, str, str, str], str], width: int
) -> Iterable[Line]:
    """The table of one workload in one direction."""
    workload, direction = part
    rows = [b for b in results if (b["extra_info"]["workload"], b["extra_info"]["direction"]) == part]
    label = rows[0]["extra_info"]["label"] if rows else ""
    yield Line("   ".join(filter(None, (workload, label, direction))), {"bold": True})
    forms = list(dict.fromkeys(b["extra_info"]["form"] for b in rows))
    rows.sort(key=lambda b: (forms.index(b["extra_info"]["form"]), b["stats"]["median"]))
    if rows:
        yield from table(rows, _columns(rows), width)
    yield from _reasons(_empty_cells({key[2:]: reason for key, reason in not_run.items() if key[:2] == part}))


LEGEND = (
    "makespan: the slowest rank of each round",
    "speed-up: over the same kernel with the whole problem on one rank, in the same rounds (each rank alone, the slowest taken)",
    "exposed: makespan minus the same form with nothing sent, the median of the rounds' differences",
    "bound: one rank's time shared out, plus this session's bare collective · imbalance: slowest rank over the mean",
)


def _legend(infos: list[dict[str, Any]]) -> Iterable[str]:
    yield from LEGEND
    if any(map(_padded, infos)):
        yield "padding: the efficiency that padded heads leave, at most"
    yield from marks_explained(infos)


def _padded(info: dict[str, Any]) -> bool:
    return info.get("padding_bound", 1) < 1


def _columns(rows: list[Benchmark]) -> list[Column]:
    fastest = min(b["stats"]["median"] for b in rows)
    unit, factor = ("ms", 1e3) if fastest >= 1e-4 else ("µs", 1e6)

    def info(key: str, form: Callable[[Any], str]) -> Callable[[Benchmark], str]:
        return lambda b: "–" if b["extra_info"].get(key) is None else form(b["extra_info"][key])

    def slowest(b: Benchmark) -> str:
        return f"{b['extra_info']['imbalance']:.3f} (rank {b['extra_info']['slowest_rank']})"

    def padding(b: Benchmark) -> str:
        return f"≤ {100 * b['extra_info']['padding_bound']:.1f} %" if _padded(b["extra_info"]) else "–"

    columns = [
        Column("form", lambda b: b["extra_info"]["form"], 0, left=True),
        Column("implementation", marked_name, 0, left=True),
        Column(f"makespan {unit}", lambda b: significant(b["stats"]["median"] * factor), 0),
        Column("speed-up [95 % CI]", _speedup, 1),
        Column("efficiency", info("efficiency", lambda x: f"{100 * x:.1f} %"), 0),
        Column("padding", padding, 0),
        Column(f"exposed {unit}", info("exposed_s", lambda x: significant(x * factor)), 1),
        Column("% bound", info("percent_of_bound", lambda x: f"{x:.0f} %"), 2),
        Column("imbalance", slowest, 3),
        Column("bus GB/s", info("probe_bus_gb_per_s", significant), 4),
        Column("peak MiB", info("peak_bytes", lambda x: f"{x / 2**20:.0f}"), 5),
        Column("error", info("error_over_budget", lambda x: f"✓ {x:.2f}"), 2),
    ]
    return columns if any(_padded(b["extra_info"]) for b in rows) else [c for c in columns if c.title != "padding"]


def _speedup(benchmark: Benchmark) -> str:
    info = benchmark["extra_info"]
    if info["speedup"] is None:
        return "–"
    return f"{info['speedup']:.2f}× [{info['speedup_ci_low']:.2f}, {info['speedup_ci_high']:.2f}]"


def _reasons(reasons: dict[str, str]) -> Iterable[Line]:
    for cell, reason in sorted(reasons.items()):
        name = cell.rpartition(" × ")[2].partition(" (")[0]
        style = {"red": True} if reason.startswith("FAILED") else {"yellow": True}
        yield Line(f"  {cell}: {reason.removeprefix(f'{name}: ')}", style)


def _empty_cells(cells: dict[tuple[str, str], str]) -> dict[str, str]:
    """Why cells are empty; an implementation or a form that is missing for one reason everywhere stands once."""
    forms, names = (list(dict.fromkeys(cell[n] for cell in cells)) for n in (0, 1))
    found: dict[str, str] = {}
    for name in names:
        reasons = {cells[form, name] for form in forms if (form, name) in cells}
        together = [form for form in forms if (form, name) in cells]
        if len(reasons) == 1 and len(together) > 1:
            found[name + ("" if together == forms else f" ({', '.join(together)})")] = reasons.pop()
            continue
        found |= {f"{form} × {name}": cells[form, name] for form in together}
    return found
