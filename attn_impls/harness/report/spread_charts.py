"""The charts of what several ranks ran together: efficiency, the strategy matrix, what communication costs."""

from __future__ import annotations

from collections.abc import Callable

from .chart import CELLS, SLANTED, WHAT, Chart, Series, base, having, panels, readable, spec
from .load import HOW
from .tables import Section

TIPS = (
    *WHAT,
    "form",
    *HOW,
    "heads",
    "ranks",
    "median ms",
    "quartile 1, ms",
    "quartile 3, ms",
    "rounds",
    "speed-up",
    "efficiency %",
    "% of bound",
    "exposed ms",
    "run",
)


def _matrix(section: Section, series: Series) -> Chart | None:
    import altair as alt

    rows = having(section.rows, "efficiency")
    if not rows:
        return None
    names = [name for name in series.names if any(row["implementation"] == name for row in rows)]
    x = alt.X("implementation:N", sort=names, title=None, axis=alt.Axis(labelAngle=-40, orient="top", labelBound=False))
    cells = base(rows, *TIPS).encode(x=x, y=alt.Y("variant:N", sort=None, title=None))
    scale = alt.Scale(domain=[0, 100], range="ramp", interpolate="rgb", clamp=True)
    chart = cells.mark_rect().encode(color=alt.Color("efficiency:Q", scale=scale, legend=None))
    if len(names) <= CELLS:
        for field, form, dy in (("ms", ".3~g", -7), ("efficiency", ".0f", 7)):
            text = cells.transform_calculate(text=f"format(datum.{field}, '{form}') + '{'' if field == 'ms' else ' %'}'")
            chart += text.mark_text(fontSize=11, dy=dy).encode(text="text:N", color=readable("datum.efficiency"))
    return Chart(
        "matrix",
        "Strategy matrix",
        "Makespan in ms (the slowest rank of each round), and efficiency below it: speed-up over the same kernel on one rank, "
        "over the ranks. "
        "Forms do different work: core sends nothing, project also projects.",
        spec(chart.properties(padding=SLANTED)),
        rows,
        panels(rows, "workload", "world_size"),
        height=38,
        lines=("variant",),
        width=150 + 50 * len(names),
        legend=False,
    )


def _efficiency(section: Section, series: Series) -> Chart | None:
    import altair as alt

    rows = having(section.rows, "efficiency", "efficiency_low", "efficiency_high")
    if not rows:
        return None
    sizes = len({row["world_size"] for row in rows}) > 1
    cases = base(rows, *TIPS).encode(color=series.colour())
    note = "Speed-up over the same kernel with the whole problem on one rank, in the same rounds, over the ranks. Dashed: 100 %."
    ideal = alt.Chart(alt.Data(values=[{"efficiency": 100}])).mark_rule(strokeDash=[5, 3])
    if sizes:
        x = alt.X("world_size:Q", scale=alt.Scale(type="log", base=2, padding=12), title="ranks (log)", axis=alt.Axis(format="d"))
        y = alt.Y("efficiency:Q", scale=alt.Scale(zero=True), title="efficiency, %")
        lines = cases.mark_line(opacity=0.7).encode(x=x, y=y, tooltip=alt.value(None))
        chart = (
            ideal.encode(y="efficiency:Q")
            + lines
            + cases.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, shape=series.shape())
        )
        return Chart("efficiency", "Efficiency", note, spec(chart), rows, panels(rows, "workload", "variant"))
    x = alt.X("efficiency:Q", scale=alt.Scale(zero=True), title="efficiency, %")
    y = alt.Y("variant:N", sort=None, title=None, axis=alt.Axis(grid=True))
    offset = alt.YOffset("implementation:N", sort=series.names)
    spread = cases.mark_rule(strokeWidth=4, opacity=0.4).encode(
        x=alt.X("efficiency_low:Q"), x2="efficiency_high:Q", y=y, yOffset=offset
    )
    points = cases.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, yOffset=offset, shape=series.shape())
    chart = ideal.encode(x="efficiency:Q") + spread + points
    note += " Bars: 95 % interval."
    return Chart(
        "efficiency",
        "Efficiency",
        note,
        spec(chart),
        rows,
        panels(rows, "workload", "world_size"),
        height=9,
        lines=("variant", "implementation"),
    )


def _exposed(section: Section, series: Series) -> Chart | None:
    """Makespan in two parts."""
    import altair as alt

    rows = [row for row in having(section.rows, "exposed_ms", "hidden_ms") if row["exposed_ms"] > 0]
    if not rows:
        return None
    rows = [row | {"bar": f"{row['variant']} · {row['implementation']}"} for row in rows]
    y = alt.Y("bar:N", title=None, sort=alt.EncodingSortField("ms", op="min"))
    cases = base(rows, *TIPS)
    work = cases.mark_bar(opacity=0.35).encode(x=alt.X("hidden_ms:Q", title="makespan, ms"), y=y, color=series.colour())
    sent = cases.mark_bar().encode(x="hidden_ms:Q", x2="ms:Q", y=y, color=series.colour())
    return Chart(
        "exposed",
        "Exposed communication",
        "Pale: the same form with nothing sent. Full: what communication adds to it, since computation does not hide it.",
        spec(work + sent),
        rows,
        panels(rows, "workload", "world_size"),
        height=15,
        lines=("bar",),
    )


MAKERS: tuple[Callable[[Section, Series], Chart | None], ...] = (_matrix, _efficiency, _exposed)
