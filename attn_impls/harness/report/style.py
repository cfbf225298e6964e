"""Colours and shapes: the page's CSS and the charts' Vega config have them from here."""

from __future__ import annotations

from typing import Any

# mid-tones: 3 : 1 or more against both papers
PALETTE = ("#3a7bd5", "#d9690f", "#2a9a52", "#d6455d", "#8c64d9", "#0e9594", "#cf5096", "#a5713f", "#7d8590", "#8a8a1c")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
GLYPHS = dict(zip(SHAPES, "●■▲◆▼✚", strict=True))

THEMES = {
    "light": {
        "ink": "#1a1f26",
        "soft": "#57606c",
        "line": "#dfe4ea",
        "paper": "#ffffff",
        "card": "#f5f7f9",
        "accent": "#1a5bb8",
        "good": "#12703a",
        "bad": "#b42318",
        "slower": "#f0854a",
        "even": "#f4f5f7",
        "faster": "#6a9ff5",
        "little": "#f2f6fd",
        "much": "#7db0f7",
    },
    "dark": {
        "ink": "#e6e9ee",
        "soft": "#a3adba",
        "line": "#303842",
        "paper": "#12161b",
        "card": "#1a2027",
        "accent": "#82b1ff",
        "good": "#5fd08a",
        "bad": "#ff8a80",
        "slower": "#a8471a",
        "even": "#2a313a",
        "faster": "#2e62b5",
        "little": "#1c232c",
        "much": "#2e62b5",
    },
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def config(theme: str) -> dict[str, Any]:
    """Vega's config for one theme."""
    c = THEMES[theme]
    text = {"labelColor": c["soft"], "titleColor": c["ink"], "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": c["paper"],
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "axis": text
        | {"gridColor": c["line"], "domainColor": c["line"], "tickColor": c["line"], "titleFontWeight": 500, "labelLimit": 320}
        | {"labelOverlap": "greedy", "labelSeparation": 6, "gridOpacity": 0.7},
        "axisBand": {"labelOverlap": False},
        "legend": text | {"symbolType": "circle", "labelLimit": 320},
        "title": {"color": c["ink"], "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 8},
        "text": {"color": c["ink"]},
        "line": {"color": c["ink"]},
        "rule": {"color": c["ink"]},
        "tick": {"color": c["ink"]},
        "range": {"diverging": [c["slower"], c["even"], c["faster"]], "ramp": [c["little"], c["much"]]},
    }
