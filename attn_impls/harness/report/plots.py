"""The charts as files, SVG and PNG, in the light theme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import tables
from .chart import Chart, Series
from .charts import charts
from .load import Run
from .style import config

WIDTH = 520  # pixels of a panel; two stand side by side


def write(runs: list[Run], folder: Path) -> list[Path]:
    """The files written: <device>-<direction>-<chart>.svg and .png."""
    import vl_convert

    series = Series(dict.fromkeys(row["implementation"] for run in runs for row in run.rows))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for section in tables.sections(runs):
        for chart in charts(section, runs, series):
            path = folder / _slug(f"{section.title} {chart.key}")
            svg = vl_convert.vegalite_to_svg(_whole(chart, section.title), config=config("light"))
            for ending, content in ((".svg", svg.encode()), (".png", vl_convert.svg_to_png(svg, scale=2))):
                files.append(path.with_name(path.name + ending))
                files[-1].write_bytes(content)
    return files


def _whole(chart: Chart, where: str) -> dict[str, Any]:
    """All panels of a chart in one spec, with a legend."""
    panels = []
    for panel in chart.panels:
        rows = chart.rows_of(panel)
        spec = _with_legends(chart.spec) if chart.legend else chart.spec
        width = max(WIDTH, chart.width) if len(chart.panels) > 1 else max(WIDTH * 1.6, chart.width)
        panels.append(
            spec
            | {"data": {"values": rows}, "width": width, "height": chart.height_of(rows)}
            | ({"title": panel.title} if panel.title else {})
        )
    title = {"text": chart.title, "subtitle": where, "fontSize": 16}
    return {"$schema": chart.spec["$schema"], "title": title, "columns": 2, "concat": [_named_once(panel) for panel in panels]}


def _named_once(panel: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in panel.items() if key != "$schema"}


def _with_legends(spec: Any) -> Any:
    """The spec without its encodings' "legend": null, which the page has since its legend is its own."""
    if isinstance(spec, list):
        return [_with_legends(one) for one in spec]
    if isinstance(spec, dict):
        return {key: _with_legends(value) for key, value in spec.items() if not (key == "legend" and value is None)}
    return spec


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
