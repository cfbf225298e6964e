"""The table that ends a run: per workload, every implementation that ran, fastest first, and why the others did not."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..workload import Workload
from . import limits
from .case import group

Benchmark = dict[str, Any]  # pytest-benchmark's dict of one case
MARKS = (("host_bound", " !"), ("sm_clock_unsteady", " ~"), ("approximate", " ≈"), ("resumed", " ↺"))
CLOSE, CLOSE_ON_CPU = 0.03, 0.1  # two medians of one process nearer than this are not told apart
MIN_KERNEL_WIDTH = 14  # columns below which a kernel's name says nothing


class Column(NamedTuple):
    title: str
    cell: Callable[[Benchmark], str]
    rank: int  # the columns of the highest rank go first when the terminal is narrow
    left: bool = False


class Line(NamedTuple):
    text: str
    style: dict[str, bool] = {}


def render(benchmarks: list[Benchmark], not_run: dict[tuple[str, str], str], machine: Iterable[str], width: int) -> list[Line]:
    """The whole summary, no line longer than `width` columns where words allow."""
    lines = [Line(text) for text in machine]
    groups: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        groups.setdefault(group(info["workload"], info.get("direction", "forward")), []).append(benchmark)
    missing, everywhere = _split(not_run, groups)
    for name in dict.fromkeys([*groups, *missing]):
        lines.append(Line(""))
        lines += _group(name, groups.get(name, []), missing.get(name, {}), width)
    if everywhere:
        lines += [Line(""), Line("did not run at all", {"bold": True})]
        lines += _reasons(everywhere)
    lines += [Line(text) for text in _legend(benchmarks)]
    return [Line(part, line.style) for line in lines for part in wrapped(line.text, width)]


def reasons(cells: Iterable[dict[str, str]]) -> dict[tuple[str, str], str]:
    """What `render` takes as not_run, of a document's "not_run"."""
    return {(group(c["workload"], c.get("direction", "forward")), c["implementation"]): c["reason"] for c in cells}


def wrapped(text: str, width: int) -> list[str]:
    return [text] if len(text) <= width else textwrap.wrap(text, width, subsequent_indent="    ")


def _group(name: str, benchmarks: list[Benchmark], missing: dict[str, str], width: int) -> Iterable[Line]:
    yield Line(name + (f"   {_problem(benchmarks[0]['extra_info'])}" if benchmarks else ""), {"bold": True})
    if benchmarks:
        rows = sorted(benchmarks, key=lambda b: b["stats"]["median"])
        yield from table(rows, _columns(rows), width)
        yield from _two_baselines(rows)
    yield from _reasons(missing)


def _two_baselines(rows: list[Benchmark]) -> Iterable[Line]:
    """Where SDPA took another time beside the others than in its own row, by more than two medians may differ."""
    alone = next((b["stats"]["median"] for b in rows if b["extra_info"]["implementation"] == "sdpa"), None)
    beside = [b["extra_info"]["sdpa_s"] for b in rows if b["extra_info"].get("sdpa_s")]
    enough = CLOSE if rows[0]["extra_info"].get("timer") == "device" else CLOSE_ON_CPU
    if alone and beside and abs(statistics.median(beside) / alone - 1) > enough:
        unit, factor = _unit(alone)
        least, most = (significant(factor * seconds) for seconds in (min(beside), max(beside)))
        others = least if least == most else f"{least} to {most}"
        yield Line(
            f"  sdpa took {others} {unit} beside the others, to which they are compared, and {significant(factor * alone)} alone"
        )


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds >= 1e-4 else ("µs", 1e6)


def _problem(info: dict[str, Any]) -> str:
    w = Workload.parse(info["workload"])
    mask = "full" if not w.causal else f"causal, window {w.window}" if w.window else "causal"
    label = f"{info['label']} · " if info.get("label") else ""
    flops = _quantity(w.flops(info.get("direction", "forward")), "FLOP")
    return f"{label}{mask} · {flops} · {limits.describe(w, info)}"


def _columns(rows: list[Benchmark]) -> list[Column]:
    fastest = rows[0]["stats"]["median"]
    unit, factor = _unit(fastest)
    timer = "device" if rows[0]["extra_info"].get("timer") == "device" else "wall"
    memory_bound = rows[0]["extra_info"].get("limit_bound") == "memory"

    def info(key: str, form: Callable[[Any], str]) -> Callable[[Benchmark], str]:
        return lambda b: "–" if b["extra_info"].get(key) is None else form(b["extra_info"][key])

    # where memory is the limit, GB/s is what a narrow terminal keeps
    rates = [Column("TFLOP/s", info("tflops", significant), 3 if memory_bound else 1)]
    if memory_bound:
        rates.append(Column("GB/s", info("tb_per_s", lambda x: significant(x * 1e3)), 1))
    columns = [
        Column("implementation", marked_name, 0, left=True),
        Column(f"{timer} {unit}", lambda b: significant(b["stats"]["median"] * factor), 0),
        Column("IQR", lambda b: f"{100 * b['stats']['iqr'] / b['stats']['median']:.1f} %", 4),
        *rates,
        Column("% limit", info("percent_of_limit", lambda x: f"{x:.3g} %" if x < 1 else f"{x:.0f} %"), 1),
        Column("vs sdpa [95 % CI]", _versus, 2),
        Column("host µs", info("host_us", lambda x: f"{x:.0f}"), 5),
        Column("peak MiB", info("peak_bytes", lambda x: f"{x / 2**20:.0f}"), 6),
        Column("error", info("error_over_budget", lambda x: f"✓ {x:.2f}"), 1),
        Column("kernel", lambda b: _short(b["extra_info"].get("kernels") or []), 7, left=True),
    ]
    return columns if timer == "device" else [c for c in columns if c.title not in ("host µs", "peak MiB")]


def table(rows: list[Benchmark], columns: list[Column], width: int) -> Iterable[Line]:
    cells = {column: [column.title, *(column.cell(row) for row in rows)] for column in columns}
    name, seconds = columns[:2]  # which are never cut away
    longest = max(1, width - 4 - max(map(len, cells[seconds])))
    cells[name] = [cell if len(cell) <= longest else cell[: longest - 1] + "…" for cell in cells[name]]

    def needed() -> int:
        return sum(2 + max(map(len, cells[column])) for column in columns if column.title != "kernel")

    while needed() > width and max(column.rank for column in columns):
        columns = [c for c in columns if c.rank < max(column.rank for column in columns)]
    if needed() + MIN_KERNEL_WIDTH > width:
        columns = [c for c in columns if c.title != "kernel"]
    for n in range(len(rows) + 1):
        parts = []
        for column in columns:
            size = max(map(len, cells[column]))
            parts.append(cells[column][n].ljust(size) if column.left else cells[column][n].rjust(size))
        text = ("  " + "  ".join(parts)).rstrip()
        style = {"cyan": True} if n == 0 else {"green": True} if n == 1 else {}
        yield Line(text if len(text) <= width else text[: width - 1] + "…", style)


def marked_name(benchmark: Benchmark) -> str:
    """The implementation, with the kernel that it chose and what is doubtful about its number."""
    info = benchmark["extra_info"]
    chosen = info.get("chosen")
    flags = "".join(mark for key, mark in MARKS if info.get(key))
    return info["implementation"] + (f" → {chosen}" if chosen else "") + flags


def _versus(benchmark: Benchmark) -> str:
    info = benchmark["extra_info"]
    if info["implementation"] == "sdpa":
        return "baseline"
    ratio, low, high = (info.get(key) for key in ("vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high"))
    return "–" if None in (ratio, low, high) else f"{_ratio(ratio)}× [{_ratio(low)}, {_ratio(high)}]"


def _ratio(x: float) -> str:
    return f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def _split(
    not_run: dict[tuple[str, str], str], groups: dict[str, list[Benchmark]]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Reasons per workload, and those of implementations that ran nowhere for one and the same reason."""
    reasons: dict[str, dict[str, str]] = {}
    for (workload, name), reason in not_run.items():
        reasons.setdefault(name, {})[workload] = reason
    workloads = {*groups, *(workload for workload, _ in not_run)}
    everywhere = {
        name: next(iter(found.values()))
        for name, found in reasons.items()
        if len(set(found.values())) == 1 and set(found) == workloads and len(workloads) > 1
    }
    missing: dict[str, dict[str, str]] = {}
    for (workload, name), reason in not_run.items():
        if name not in everywhere:
            missing.setdefault(workload, {})[name] = reason
    return missing, everywhere


def _reasons(reasons: dict[str, str]) -> Iterable[Line]:
    size = max(map(len, reasons), default=0)
    for name, reason in sorted(reasons.items()):
        text = f"  {name.ljust(size)}  {' '.join(reason.removeprefix(f'{name}: ').split())}"
        failed = reason.startswith("FAILED")
        yield Line(text, {"red": True} if failed else {"yellow": True})


def _legend(benchmarks: list[Benchmark]) -> list[str]:
    infos = [b["extra_info"] for b in benchmarks]
    lines = []
    if infos:
        lines.append("error: worst row against float64, as a share of what its dtype excuses (✓ up to 1)")
    lines += marks_explained(infos)
    lines += _probes(infos)
    clocks = [info["sm_mhz_median"] for info in infos if info.get("sm_mhz_median")]
    if clocks:
        lines.append(f"SM clock while timing: median {statistics.median(clocks):.0f} MHz, lowest case {min(clocks):.0f} MHz")
    return ["", *lines] if lines else []


def marks_explained(infos: list[dict[str, Any]]) -> list[str]:
    """What the marks of `marked_name` mean, of those that these cases have."""
    lines = []
    if any(info.get("chosen") for info in infos):
        lines.append("→ the kernel that a dispatching library chose")
    if any(info.get("host_bound") for info in infos):
        lines.append("! the call waits for the device: its time includes the host's")
    if any(info.get("sm_clock_unsteady") for info in infos):
        lines.append("~ the SM clock fell below 95 % of its median in some rounds")
    if any(info.get("approximate") for info in infos):
        classes = sorted({info["approximate"] for info in infos if isinstance(info.get("approximate"), str)})
        named = f" ({', '.join(classes)})" if classes else ""
        lines.append(f"≈ approximate kernel{named}, by its own account: its error is a share of what that arithmetic excuses")
    if any(info.get("resumed") for info in infos):
        lines.append("↺ measured by the run that this one resumed")
    return lines


def _probes(infos: list[dict[str, Any]]) -> list[str]:
    """What the implementations answered before they were timed, those with the same answers together."""
    answers: dict[str, dict[str, None]] = {}
    for info in infos:
        if info.get("probes"):
            answers.setdefault(info["probes"], {})[info["implementation"]] = None
    told = "; ".join(f"{', '.join(names)}: {answer}" for answer, names in answers.items())
    return [f"asked for alignment, window, scale, heads, layout, gradients, and company: {told}"] if told else []


def _short(kernels: list[str]) -> str:
    """The longest-running kernel's name without its namespaces and arguments, and how many more there are."""
    if not kernels:
        return "–"
    name = re.sub(r"^void |\(anonymous namespace\)::|aten::|at::native::", "", kernels[0])
    inner = re.search(r"(FlashAttn\w+|flash_fwd\w*|fmha_\w+)", name)
    name = inner.group(1) if inner else re.split(r"[<(]", name)[0]
    name = name.split("::")[-1] or kernels[0]
    return (name if len(name) <= 40 else name[:39] + "…") + (f" +{len(kernels) - 1}" if len(kernels) > 1 else "")


def significant(x: float) -> str:
    """Three significant digits, four where that is still short."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.4g}" if x >= 100 else f"{x:.3g}"


def _quantity(x: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.2f} {prefix}{unit}"
    return f"{x:.0f} {unit}"
