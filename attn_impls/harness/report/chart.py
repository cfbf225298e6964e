"""What every chart of the report is made of: a Vega-Lite spec over the data set "cases", its panels, its series."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .load import HOW, Row
from .style import PALETTE, SHAPES

SLANTED = {"left": 4, "top": 4, "right": 30, "bottom": 4}  # room for the last of a heat map's slanted titles
CELLS = 24  # columns of a heat map beyond which its cells carry no text


@dataclass(frozen=True)
class Panel:
    """One frame of a chart: the rows whose fields have these values."""

    title: str
    where: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A spec, drawn once for each panel.

    `width`: pixels below which a panel scrolls sideways; 0: it can be narrow. `height`: pixels, times the number of
    different values that the panel's rows have in each field of `lines`.
    """

    key: str
    title: str
    note: str
    spec: dict[str, Any] = field(repr=False)
    rows: list[Row] = field(repr=False)
    panels: tuple[Panel, ...] = (Panel("", {}),)
    width: int = 0
    height: int = 320
    lines: tuple[str, ...] = ()
    legend: bool = True

    def rows_of(self, panel: Panel) -> list[Row]:
        return [row for row in self.rows if all(row[key] == value for key, value in panel.where.items())]

    def height_of(self, rows: list[Row]) -> int:
        return self.height * math.prod(len({row[line] for row in rows}) for line in self.lines)


class Series:
    """Colour and shape of each implementation, the same in every chart of a report."""

    def __init__(self, names: Iterable[str]):
        self.names = list(names)
        self.colours = [PALETTE[n % len(PALETTE)] for n in range(len(self.names))]
        self.shapes = [SHAPES[n % len(SHAPES)] for n in range(len(self.names))]

    def colour(self) -> Any:
        import altair as alt

        return alt.Color("implementation:N", legend=None, scale=alt.Scale(domain=self.names, range=self.colours))

    def shape(self) -> Any:
        import altair as alt

        return alt.Shape("implementation:N", legend=None, scale=alt.Scale(domain=self.names, range=self.shapes))


def base(rows: list[Row], *tips: str) -> Any:
    """A chart of "cases" with tooltips; a field that none of the rows has is left out, and one that a row lacks reads –."""
    import altair as alt

    known = {tip: TIPS[tip] for tip in tips if any(row.get(TIPS[tip][0]) not in (None, "") for row in rows)}
    text = {
        f"tip_{name}": f"isValid(datum.{name}) && datum.{name} !== '' ? "
        + (f"format(datum.{name}, '{form}')" if form else f"datum.{name}")
        + " : '–'"
        for name, form in known.values()
    }
    shown = [alt.Tooltip(f"tip_{name}:N", title=tip) for tip, (name, _) in known.items()]
    return alt.Chart(alt.NamedData("cases")).transform_calculate(**text).encode(tooltip=shown)


def spec(chart: Any) -> dict[str, Any]:
    """As wide as its place on the page, without a theme: the page and the files bring their own."""
    found = chart.to_dict()
    found.pop("config", None)
    return found | {"width": "container"}


def having(rows: list[Row], *names: str) -> list[Row]:
    return [row for row in rows if all(row.get(name) is not None for name in names)]


def panels(rows: list[Row], *names: str) -> tuple[Panel, ...]:
    found = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    unit = {"world_size": " ranks"}
    titles = (" · ".join(f"{value}{unit.get(name, '')}" for name, value in zip(names, values, strict=True)) for values in found)
    return tuple(Panel(title, dict(zip(names, values, strict=True))) for title, values in zip(titles, found, strict=True))


def log(**options: Any) -> Any:
    import altair as alt

    return alt.Scale(type="log", nice=False, **options)


def readable(field_: str) -> Any:
    """Black or white, whichever reads on the cell's colour."""
    import altair as alt

    return alt.condition(f"luminance(scale('color', {field_})) > 0.179", alt.value("#000000"), alt.value("#ffffff"))


# title: (field, d3 format; "" for text)
TIPS = {
    "workload": ("workload", ""),
    "preset": ("label", ""),
    "implementation": ("implementation", ""),
    "kernel chosen": ("chosen", ""),
    "form": ("form", ""),
    **{key: (key, "") for key in (*HOW, "heads")},
    "ranks": ("world_size", "d"),
    "median ms": ("ms", ".4g"),
    "quartile 1, ms": ("q1", ".4g"),
    "quartile 3, ms": ("q3", ".4g"),
    "rounds": ("rounds", "d"),
    "TFLOP/s": ("tflops", ".4g"),
    "limit, ms": ("limit_ms", ".4g"),
    "% of limit": ("percent", ".3g"),
    "vs sdpa": ("vs_sdpa", ".3f"),
    "95 % CI from": ("vs_low", ".3f"),
    "95 % CI to": ("vs_high", ".3f"),
    "FLOP/byte": ("intensity", ".4g"),
    "error / budget": ("error", ".3f"),
    "host µs": ("host_us", ".3g"),
    "device µs": ("us", ".4g"),
    "× the fastest": ("slower", ".3f"),
    "efficiency %": ("efficiency", ".1f"),
    "speed-up": ("speedup", ".3f"),
    "exposed ms": ("exposed_ms", ".3g"),
    "% of bound": ("bound_percent", ".3g"),
    "change since its first run": ("change", "+.1%"),
    "run": ("run", ""),
    "date": ("when", ""),
    "torch": ("torch", ""),
    "library": ("library", ""),
}
WHAT = ("workload", "preset", "implementation", "kernel chosen")
TIME = ("median ms", "quartile 1, ms", "quartile 3, ms", "rounds", "TFLOP/s", "limit, ms", "% of limit", "vs sdpa", "run")
