"""The charts as files, SVG and PNG, in the light theme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import tables
from .chart import Chart, Series
from .charts import charts
from .load import Row, Run
from .style import config

WIDTH = 520  # pixels of a panel; two stand side by side

WHOLE = ("$schema", "padding")  # of a whole drawing, not of its panels


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
    """All panels of a chart in one spec, with their data and a legend."""
    panels = []
    for panel in chart.panels:
        rows = chart.rows_of(panel)
        width = max(WIDTH if len(chart.panels) > 1 else WIDTH * 1.6, chart.width)
        spec = _filled(chart.spec, rows, chart.legend) | {"width": width, "height": chart.height_of(rows)}
        titled = {"title": panel.title} if panel.title else {}
        panels.append({key: value for key, value in spec.items() if key not in WHOLE} | titled)
    title = {"text": chart.title, "subtitle": where, "fontSize": 16}
    own = {"scale": {"yOffset": "independent"}}  # or a panel with fewer implementations would have the others' spacing
    return {"$schema": chart.spec["$schema"], "title": title, "columns": 2, "concat": panels, "resolve": own}


def _filled(spec: Any, rows: list[Row], legend: bool) -> Any:
    """The spec with rows where it says "cases", and with the legend that the page makes itself."""
    if isinstance(spec, list):
        return [_filled(one, rows, legend) for one in spec]
    if not isinstance(spec, dict):
        return spec
    if spec == {"name": "cases"}:
        return {"values": rows}
    wanted = legend and spec.get("field") == "implementation"
    return {key: _filled(value, rows, legend) for key, value in spec.items() if not (wanted and key == "legend")}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
