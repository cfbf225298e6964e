"""The charts of one device and direction: which is faster, by how much, how far from the limit, at what error."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from . import spread_charts
from .chart import CELLS, SLANTED, TIME, WHAT, Chart, Series, base, having, log, panels, readable, spec
from .history import history
from .load import Row, Run
from .tables import Section, ranking

PANELS = 24  # workloads beyond which they share one frame
DEEPEST = 2  # of the heat map's colours: 4 × slower or faster, and all beyond it, look alike


def charts(section: Section, runs: list[Run], series: Series) -> list[Chart]:
    """Those for which the section has data, in the order of the report."""
    makers: tuple[Callable[[Section, Series], Chart | None], ...]
    makers = spread_charts.MAKERS if section.spread else (_speedup, _time, _lengths, _rates, *_rooflines(section), _error, _host)
    found = [make(section, series) for make in makers]
    return [chart for chart in (*found, history(section, series, runs)) if chart]


def _speedup(section: Section, series: Series) -> Chart | None:
    import altair as alt

    rows = having(section.rows, "vs_sdpa")
    names = [name for name in series.names if any(row["implementation"] == name for row in rows)]
    if len(names) < 2:
        return None
    if ranked := ranking(section):
        order = [record.implementation for record in ranked.records]
        names.sort(key=lambda name: order.index(name) if name in order else len(order))
    x = alt.X("implementation:N", sort=names, title=None, axis=alt.Axis(labelAngle=-40, orient="top", labelBound=False))
    y = alt.Y("workload:N", sort=None, title=None)
    scale = alt.Scale(domain=[-DEEPEST, DEEPEST], domainMid=0, range="diverging", interpolate="rgb", clamp=True)
    cells = base(rows, *WHAT, "vs sdpa", "95 % CI from", "95 % CI to", *TIME[:-2], "run").encode(x=x, y=y)
    cells = cells.transform_calculate(log2="log(datum.vs_sdpa) / LN2")
    chart = cells.mark_rect().encode(color=alt.Color("log2:Q", scale=scale, legend=None))
    if len(names) <= CELLS:
        text = cells.transform_calculate(text="format(datum.vs_sdpa, datum.vs_sdpa < 0.1 ? '.3f' : '.2f')")
        chart += text.mark_text(fontSize=11).encode(text="text:N", color=readable("datum.log2"))
    return Chart(
        "speed-up",
        "Speed-up over SDPA",
        "Time of SDPA's default dispatch over the implementation's, in the same rounds. Blue is faster, orange slower; "
        "colours end at 4 ×. An empty cell did not run.",
        spec(chart.properties(padding=SLANTED)),
        rows,
        height=26,
        lines=("workload",),
        width=240 + 46 * len(names),
        legend=False,
    )


def _time(section: Section, series: Series) -> Chart | None:
    import altair as alt

    rows = section.rows
    tips = (*WHAT, *TIME)
    x = alt.X("ms:Q", scale=log(padding=12), title=f"{_clock(rows)} time, ms (log)")
    together = len(section.workloads) > PANELS
    order = alt.EncodingSortField("ms", op="min", order="ascending")
    line = "workload:N" if together else "implementation:N"
    y = alt.Y(line, sort=None if together else order, title=None, axis=alt.Axis(grid=True, labelLimit=260))
    cases = base(rows, *tips).encode(y=y, color=series.colour())
    spread = cases.mark_rule(strokeWidth=5, opacity=0.4).encode(x=alt.X("q1:Q"), x2="q3:Q")
    points = cases.mark_point(filled=True, size=70, opacity=1).encode(x=x, shape=series.shape())
    chart = spread + points
    if not together:
        shown = "datum.ms < 0.1 ? format(datum.ms * 1000, '.3~g') + ' µs' : format(datum.ms, '.3~g') + ' ms'"
        text = base(rows, *tips).transform_calculate(shown=shown).encode(x=x, y=y, text="shown:N")
        chart += text.mark_text(align="left", dx=9, fontSize=11)
    if having(rows, "limit_ms"):
        limit = base(rows, "workload", "limit, ms").transform_filter("isValid(datum.limit_ms)")
        if together:
            chart += limit.mark_tick(thickness=2, size=16).encode(x="limit_ms:Q", y=alt.Y("workload:N", sort=None))
        else:
            chart += limit.mark_rule(strokeDash=[5, 3]).encode(x="mean(limit_ms):Q", tooltip=alt.value(None))
    return Chart(
        "time",
        "Time by workload",
        "Median, with the bar from the first to the third quartile. " + _limit_note(rows),
        spec(chart),
        rows,
        Chart.panels if together else panels(rows, "workload"),
        height=20,
        lines=("workload",) if together else ("implementation",),
        width=560 if together else 0,
        legend=together,
    )


def _clock(rows: list[Row]) -> str:
    return "device" if all(row["timer"] == "device" for row in rows) else "wall"


def _limit_note(rows: list[Row]) -> str:
    sources = {row["limit_source"] for row in having(rows, "limit_ms")} - {""}
    return f"Dashed: the hardware's limit ({', '.join(sorted(sources))})." if sources else ""


def _swept(section: Section) -> list[Row]:
    """The rows of workloads that differ from another in their length alone."""
    lengths: dict[str, set[int]] = {}
    for row in section.rows:
        lengths.setdefault(row["family"], set()).add(row["length"])
    return [row for row in section.rows if len(lengths[row["family"]]) > 1]


def _lengths(section: Section, series: Series) -> Chart | None:
    rows = _swept(section)
    return _against_length(
        rows,
        series,
        ("q1", "ms", "q3", "limit_ms"),
        f"{_clock(rows)} time, ms (log)",
        "time-length",
        "Time against sequence length",
    )


def _rates(section: Section, series: Series) -> Chart | None:
    rows = having(_swept(section), "tflops")
    names = ("tflops_low", "tflops", "tflops_high", "limit_tflops")
    return _against_length(rows, series, names, "TFLOP/s (log)", "tflops-length", "TFLOP/s against sequence length")


def _against_length(
    rows: list[Row], series: Series, names: tuple[str, str, str, str], y: str, key: str, title: str
) -> Chart | None:
    import altair as alt

    if not rows:
        return None
    low, middle, high, limit = names
    axis = alt.Axis(format="d", values=sorted({row["length"] for row in rows}))
    x = alt.X("length:Q", scale=log(base=2, padding=10), title="sequence length, keys (log)", axis=axis)
    scale = log(padding=10)
    cases = base(rows, *WHAT, *TIME).encode(x=x, color=series.colour())
    band = cases.mark_area(opacity=0.25).encode(
        y=alt.Y(f"{low}:Q", scale=scale, title=y), y2=f"{high}:Q", tooltip=alt.value(None)
    )
    line = cases.mark_line(strokeWidth=2).encode(y=f"{middle}:Q", tooltip=alt.value(None))
    points = cases.mark_point(filled=True, size=60, opacity=1).encode(y=f"{middle}:Q", shape=series.shape())
    chart = band + line + points
    if having(rows, limit):
        known = base(rows, "workload", "limit, ms").transform_filter(f"isValid(datum.{limit})").encode(x=x)
        chart += known.mark_line(strokeDash=[5, 3]).encode(y=f"mean({limit}):Q", tooltip=alt.value(None))
    note = "Median, with the band from the first to the third quartile. " + _limit_note(rows)
    return Chart(key, title, note, spec(chart), rows, panels(rows, "family"))


def _rooflines(section: Section) -> list[Callable[[Section, Series], Chart | None]]:
    dtypes = dict.fromkeys(row["dtype"] for row in section.rows)
    return [lambda section, series, dtype=dtype: _roofline(section, series, dtype) for dtype in dtypes]  # type: ignore[misc]


def _roofline(section: Section, series: Series, dtype: str) -> Chart | None:
    """A line bends where compute takes over from memory: min(peak, bandwidth × intensity)."""
    import altair as alt

    rows = [row for row in having(section.rows, "intensity", "tflops") if row["dtype"] == dtype]
    roofs = _roofs(rows)
    if not roofs:
        return None
    x = alt.X("intensity:Q", scale=log(padding=10), title="arithmetic intensity, FLOP/byte (log)")
    y = alt.Y("tflops:Q", scale=log(padding=10), title="TFLOP/s (log)")
    lines = alt.Chart(alt.Data(values=roofs)).encode(x=x, y=y)
    roof = lines.mark_line(strokeWidth=1.5).encode(strokeDash=alt.StrokeDash("roof:N", legend=None), detail="roof:N")
    ends = lines.transform_filter("datum.label !== ''")
    label = ends.mark_text(align="right", dy=-7, fontSize=11).encode(text="label:N")
    cases = base(rows, *WHAT, "FLOP/byte", *TIME).encode(x=x, y=y, color=series.colour(), shape=series.shape())
    points = cases.mark_point(filled=True, size=70, opacity=0.9)
    return Chart(
        f"roofline-{dtype}",
        f"Roofline, {dtype}",
        "FLOPs of the unmasked pairs over the least bytes (inputs read once, output written once). "
        "Datasheet: dense peak and bandwidth; here: the matmul and the copy measured in the session.",
        spec(roof + label + points),
        rows,
        height=380,
    )


def _roofs(rows: list[Row]) -> list[Row]:
    points: list[Row] = []
    for source, label in (("datasheet", "datasheet"), ("ceiling", "measured here")):
        known = having(rows, f"{source}_tflops", f"{source}_tb_per_s")
        if not known:
            continue
        peak, bandwidth = (statistics.median(row[f"{source}_{rate}"] for row in known) for rate in ("tflops", "tb_per_s"))
        least, most = min(row["intensity"] for row in rows) / 4, max(row["intensity"] for row in rows) * 2
        bend = peak / bandwidth
        xs = [least, *([bend] if least < bend < most else []), most]
        text = f"{label}: {peak:.4g} TFLOP/s, {bandwidth:.3g} TB/s"
        points += [
            {"intensity": x, "tflops": min(peak, bandwidth * x), "roof": label, "label": text if x == most else ""} for x in xs
        ]
    return points


def _error(section: Section, series: Series) -> Chart | None:
    import altair as alt

    fastest = {workload: rows[0]["ms"] for workload, rows in section.workloads.items()}
    rows = [row | {"slower": row["ms"] / fastest[row["workload"]]} for row in having(section.rows, "error")]
    if not rows:
        return None
    x = alt.X("slower:Q", scale=log(padding=10), title="time, as a multiple of its workload's fastest (log)")
    y = alt.Y("error:Q", scale=alt.Scale(zero=True), title="error, as a share of its budget")
    cases = base(rows, *WHAT, "error / budget", "× the fastest", *TIME)
    points = cases.mark_point(filled=True, size=70, opacity=0.9).encode(x=x, y=y, color=series.colour(), shape=series.shape())
    budget = alt.Chart(alt.Data(values=[{"error": 1}])).mark_rule(strokeDash=[5, 3]).encode(y="error:Q")
    return Chart(
        "error",
        "Error against time",
        "Worst row against float64, as a share of what the workload's dtype excuses: 1 (dashed) is the most that passes. "
        "Left and low is good.",
        spec(budget + points),
        rows,
    )


def _host(section: Section, series: Series) -> Chart | None:
    import altair as alt

    rows = [row for row in having(section.rows, "host_us") if row["timer"] == "device" and row["host_us"] > 0]
    if not rows:
        return None
    ends = [f(row[name] for row in rows for name in ("us", "host_us")) for f in (min, max)]
    x = alt.X("us:Q", scale=log(padding=10), title="device time, µs (log)")
    y = alt.Y("host_us:Q", scale=log(padding=10), title="host time to enqueue, µs (log)")
    line = alt.Chart(alt.Data(values=[{"us": end, "host_us": end} for end in ends])).encode(x=x, y=y)
    cases = base(rows, *WHAT, "device µs", "host µs", "run").encode(x=x, y=y, color=series.colour(), shape=series.shape())
    points = cases.mark_point(filled=True, size=70, opacity=0.9)
    return Chart(
        "host",
        "Host against device time",
        "Above the dashed line a call takes the host longer than the device: back to back, such calls leave the GPU idle.",
        spec(line.mark_line(strokeDash=[5, 3], strokeWidth=1.5) + points),
        rows,
    )
