"""Each case over the runs of one device: did it change?"""

from __future__ import annotations

from .chart import WHAT, Chart, Series, base, log, spec
from .load import HOW, Row, Run, identity
from .tables import Section


def history(section: Section, series: Series, runs: list[Run]) -> Chart | None:
    """Time over that of the case's first run; None where no case ran twice."""
    import altair as alt

    rows = _tracks(section, runs)
    if not rows:
        return None
    order = list(dict.fromkeys(run.name for run in runs))
    x = alt.X("run:N", sort=order, title="run, oldest first", axis=alt.Axis(labelAngle=-30))
    y = alt.Y("relative:Q", scale=log(padding=10), title="time over that of its first run (log)")
    what = (*WHAT, "form", *HOW, "heads", "ranks")
    times = ("median ms", "quartile 1, ms", "quartile 3, ms", "change since its first run")
    cases = base(rows, *what, *times, "date", "torch", "library").encode(x=x, y=y, color=series.colour())
    lines = cases.mark_line(strokeWidth=1.5, opacity=0.7).encode(detail="track:N", tooltip=alt.value(None))
    spread = cases.mark_rule(strokeWidth=3, opacity=0.3).encode(y=alt.Y("low:Q"), y2="high:Q", tooltip=alt.value(None))
    points = cases.mark_point(filled=True, size=60, opacity=1).encode(shape=series.shape())
    return Chart(
        "history",
        "History",
        "One line a case; below 1 it became faster. Bars: first to third quartile of the run. "
        "Rounds of one run share its machine's state: "
        "a small step between two runs may be the machine.",
        spec(spread + lines + points),
        rows,
    )


def _tracks(section: Section, runs: list[Run]) -> list[Row]:
    """The rows of each case that ran more than once, with their times over that of its first run."""
    wanted = {identity(row) for row in section.rows}
    tracks: dict[tuple[object, ...], list[Row]] = {}
    for run in runs:
        for row in run.rows:
            if identity(row) in wanted:
                tracks.setdefault(identity(row), []).append(row | {"torch": str(run.machine.get("torch") or "")})
    return [
        row
        | {
            "track": " ".join(str(part) for part in key[2:] if part),
            "change": row["ms"] / track[0]["ms"] - 1,
            **{name: row[source] / track[0]["ms"] for name, source in (("relative", "ms"), ("low", "q1"), ("high", "q3"))},
        }
        for key, track in tracks.items()
        if len(track) > 1
        for row in track
    ]
