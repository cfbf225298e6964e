"""The report as one HTML file: its tables, its charts' specs and data, and the libraries that draw them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from ... import __name__ as package
from . import circumstances, tables
from .chart import Chart, Series
from .charts import charts
from .load import Row, Run
from .style import FONT, GLYPHS, THEMES, config

OWN = resources.files(__package__)


def render(runs: list[Run]) -> str:
    """The whole file. Raises ImportError without the libraries of the extra "report"."""
    import jinja2
    import vl_convert

    series = Series(dict.fromkeys(row["implementation"] for run in runs for row in run.rows))
    sections = tables.sections(runs)
    drawn = [charts(section, runs, series) for section in sections]
    store = Store()
    specs = [[_drawing(chart, store) for chart in found] for found in drawn]
    described = {"charts": [one for found in specs for one in found], "data": store.data, "series": _series(series)}
    described |= {"themes": {theme: config(theme) for theme in THEMES}}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_own("page.html"))
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    return template.render(
        title=_title(runs),
        runs=runs,
        machines=circumstances.headlines(runs),
        sections=[
            {
                "section": section,
                "doubts": tables.doubts(section),
                "winners": tables.winners(section),
                "ranking": tables.ranking(section),
                "cases": tables.cases(section),
                "charts": found,
            }
            for section, found in zip(sections, specs, strict=True)
        ],
        missing=circumstances.missing(runs),
        environment=circumstances.environment(runs),
        workloads=list(dict.fromkeys(row["workload"] for run in runs for row in run.rows)),
        series=_series(series),
        total=sum(len(section.rows) for section in sections),
        measured=sum(len(run.rows) for run in runs),
        themes=THEMES,
        font=FONT,
        css=jinja2.utils.markupsafe.Markup(_own("page.css")),
        js=jinja2.utils.markupsafe.Markup(_own("page.js")),
        libraries=jinja2.utils.markupsafe.Markup(bundle.replace("</script", "<\\/script")),
        described=jinja2.utils.markupsafe.Markup(script_json(described)),
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script>: no markup can begin in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


class Store:
    """Each list of rows once, however many charts draw it; numbers with six digits, and no field that is empty."""

    def __init__(self) -> None:
        self.data: list[list[Row]] = []
        self._known: dict[str, int] = {}

    def index(self, rows: list[Row]) -> int:
        slim = [{key: _slim(value) for key, value in row.items() if value not in (None, "")} for row in rows]
        text = json.dumps(slim)
        if text not in self._known:
            self._known[text] = len(self.data)
            self.data.append(slim)
        return self._known[text]


def _slim(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _drawing(chart: Chart, store: Store) -> dict[str, Any]:
    panels = [{"title": panel.title, "where": panel.where} for panel in chart.panels]
    names = {name: getattr(chart, name) for name in ("key", "title", "note", "legend", "width", "height", "lines")}
    return names | {"spec": chart.spec, "rows": store.index(chart.rows), "panels": panels}


def _series(series: Series) -> list[dict[str, str]]:
    rows = zip(series.names, series.colours, series.shapes, strict=True)
    return [{"name": name, "colour": colour, "glyph": GLYPHS[shape]} for name, colour, shape in rows]


def _title(runs: list[Run]) -> str:
    return f"{package} · " + ", ".join(dict.fromkeys(run.device for run in runs))


def _own(name: str) -> str:
    return OWN.joinpath(name).read_text(encoding="utf-8")
