"""The table that ends a distributed run: per workload, form × implementation, and why the other cells are empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import environment, topology
from .summary import Benchmark, Column, Line, significant, table, wrapped


def write(reporter: Any, session: Any) -> None:
    """Print the summary of what the ranks measured, on the rank whose reporter shows it."""
    spreads = session.spreads
    if not spreads.results and not spreads.not_run:
        return
    info = session.machine_info | topology.facts(session.ranks)
    machine = [*environment.describe(info, session.state), describe(info)]
    reporter.section(f"attention on {session.ranks.size} ranks", "=", bold=True)
    for line in render(spreads.results, spreads.not_run, machine, session.config.get_terminal_writer().fullwidth):
        reporter.write_line(line.text, **line.style)


def describe(info: dict[str, Any]) -> str:
    nccl = f" {info['nccl']}" if info["nccl"] else ""
    return f"{info['world_size']} ranks · {info['backend']}{nccl} · {info['topology']}"


def render(results: list[Benchmark], not_run: dict[tuple[str, str, str], str], machine: Iterable[str], width: int) -> list[Line]:
    lines = [Line(text) for text in machine]
    for workload in dict.fromkeys([b["extra_info"]["workload"] for b in results] + [key[0] for key in not_run]):
        rows = [b for b in results if b["extra_info"]["workload"] == workload]
        label = rows[0]["extra_info"]["label"] if rows else ""
        lines += [Line(""), Line(workload + (f"   {label}" if label else ""), {"bold": True})]
        forms = list(dict.fromkeys(b["extra_info"]["form"] for b in rows))
        rows.sort(key=lambda b: (forms.index(b["extra_info"]["form"]), b["stats"]["median"]))
        if rows:
            lines += table(rows, _columns(rows), width)
        lines += _reasons(_empty_cells(workload, not_run))
    lines += [Line(""), *(Line(text) for text in LEGEND)]
    return [Line(part, line.style) for line in lines for part in wrapped(line.text, width)]


LEGEND = (
    "makespan: the slowest rank of each round",
    "speed-up: over the same kernel with the whole problem on one rank, in the same rounds (each rank alone, the slowest taken)",
    "exposed: makespan minus the same form with nothing sent",
    "bound: one rank's time shared out, plus this session's bare collective · imbalance: slowest rank over the mean",
)


def _columns(rows: list[Benchmark]) -> list[Column]:
    fastest = min(b["stats"]["median"] for b in rows)
    unit, factor = ("ms", 1e3) if fastest >= 1e-4 else ("µs", 1e6)

    def info(key: str, form: Callable[[Any], str]) -> Callable[[Benchmark], str]:
        return lambda b: "–" if b["extra_info"].get(key) is None else form(b["extra_info"][key])

    def slowest(b: Benchmark) -> str:
        return f"{b['extra_info']['imbalance']:.3f} (rank {b['extra_info']['slowest_rank']})"

    return [
        Column("form", lambda b: b["extra_info"]["form"], 0, left=True),
        Column("implementation", lambda b: b["extra_info"]["implementation"], 0, left=True),
        Column(f"makespan {unit}", lambda b: significant(b["stats"]["median"] * factor), 0),
        Column("speed-up [95 % CI]", _speedup, 1),
        Column("efficiency", info("efficiency", lambda x: f"{100 * x:.1f} %"), 0),
        Column(f"exposed {unit}", info("exposed_s", lambda x: significant(x * factor)), 1),
        Column("% bound", info("percent_of_bound", lambda x: f"{x:.0f} %"), 2),
        Column("imbalance", slowest, 3),
        Column("bus GB/s", info("probe_bus_gb_per_s", significant), 4),
        Column("peak MiB", info("peak_bytes", lambda x: f"{x / 2**20:.0f}"), 5),
        Column("error", info("error_over_budget", lambda x: f"✓ {x:.2f}"), 2),
    ]


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


def _empty_cells(workload: str, not_run: dict[tuple[str, str, str], str]) -> dict[str, str]:
    """Why cells are empty; an implementation or a form that is missing for one reason everywhere stands once."""
    cells = {(form, name): reason for (w, form, name), reason in not_run.items() if w == workload}
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
