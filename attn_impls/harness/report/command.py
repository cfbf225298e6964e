"""python -m attn_impls report: what was asked for, from these files."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from . import markdown
from .load import load

EXTRA = ("altair", "vl_convert")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN.json")
    command.add_argument("-o", "--output", metavar="FILE.html", help="one HTML file with everything in it")
    command.add_argument("--markdown", action="store_true", help="print the tables for a pull request")
    command.add_argument("--plots", metavar="DIR", help="write each chart as SVG and PNG")


def run(given: argparse.Namespace) -> None:
    """Raises ValueError with one line for a file or a wish that cannot be served."""
    if not (given.output or given.markdown or given.plots):
        raise ValueError("nothing was asked for: give -o FILE.html, --markdown or --plots DIR")
    if (given.output or given.plots) and not all(map(find_spec, EXTRA)):
        raise ValueError('charts need altair and vl-convert: pip install "attn-impls[report]"')
    runs = load(given.runs)
    if given.markdown:
        print(markdown.render(runs))
    if given.output:
        from . import page

        path = Path(given.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.render(runs), encoding="utf-8")
        if not given.markdown:
            print(f"{sum(len(run.rows) for run in runs)} cases, {path.stat().st_size / 1e6:.1f} MB: {path}")
    if given.plots:
        from . import plots

        files = plots.write(runs, Path(given.plots))
        if not given.markdown:
            print(f"{len(files)} files: {given.plots}")
