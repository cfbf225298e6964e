"""The HTML report in a real browser: charts drawn, filters, themes, narrow screens, and nothing asked of any network."""

import json

import pytest
from browser import MIDDLE, Page, executable
from test_report import CAUSAL, EVIL, H200, SEED, SHORT, case, document

from attn_impls.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not executable(), reason="no Chromium here: apt-get install chromium"),
]

# what a reader cannot read: text whose contrast with what is behind it is below WCAG's AA
PALE = """(() => {
  const channels = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = channels(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } };
  const pale = [];
  for (const e of document.querySelectorAll("h1, h2, h3, h4, p, td, th, summary, label, input, button, .drawing text")) {
    if (!e.checkVisibility() || e.closest(".mark-text")) continue;  // the charts' cells choose black or white themselves
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const [a, b] = [luminance(channels(svg ? style.fill : style.color)), luminance(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) pale.push(`${e.tagName} ${e.textContent.slice(0, 40)}`);
  }
  return pale;
})()"""
EMPTY = """[...document.querySelectorAll(".drawing")].filter((e) => e.checkVisibility() &&
  !e.querySelector(".mark-symbol path, .mark-rect path, .mark-rule line")).length"""
SHOWN = """(name) => [...document.querySelectorAll(".drawing text")].filter(
  (e) => e.checkVisibility() && e.textContent === name).length"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """`report(document or path, …)` is the page made of them."""
    pytest.importorskip("altair", reason="the extra report is not installed")
    pytest.importorskip("vl_convert", reason="the extra report is not installed")
    folder = tmp_path_factory.mktemp("report")

    def make(*sources, name="report"):
        paths = []
        for n, source in enumerate(sources):
            if isinstance(source, dict):
                paths.append(folder / f"{name}{n}.json")
                paths[-1].write_text(json.dumps(source))
            else:
                paths.append(source)
        assert main(["report", *map(str, paths), "-o", str(folder / f"{name}.html")]) == 0
        return folder / f"{name}.html"

    return make


@pytest.fixture(scope="module")
def saved(report):
    return report(*H200, name="h200")


def healthy(page):
    assert page.problems == []
    assert all(url.startswith(("file://", "data:", "blob:")) for url in page.requests), page.requests
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_the_saved_runs_are_drawn_whole_and_legible(saved, width, theme):
    with Page(saved, width, theme=theme) as page:
        page.run("drawAll()")
        healthy(page)
        keys = page.run("[...document.querySelectorAll('figure.chart')].map((figure) => figure.dataset.chart)")
        assert keys == ["speed-up", "time", "roofline-bf16", "error", "host", "matrix", "efficiency", "exposed"]
        assert page.run("document.querySelectorAll('.drawing').length") == page.run(
            "document.querySelectorAll('.drawing svg').length"
        )
        assert page.run(EMPTY) == 0
        assert page.run(PALE) == []
        assert page.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if theme == "light" else "rgb(18, 22, 27)"
        )


def test_only_what_is_near_the_screen_is_drawn_at_first(saved):
    with Page(saved) as page:
        page.wait(lambda: page.run("document.querySelectorAll('.drawing svg').length > 0"))
        assert page.run("document.querySelectorAll('.drawing svg').length < document.querySelectorAll('.drawing').length")


def test_filters_take_rows_from_charts_and_tables_alike(saved):
    with Page(saved) as page:
        page.run("drawAll()")
        assert page.run(f"({SHOWN})('flash_attn3')") > 0
        page.click("#implementations [data-name=flash_attn3]")
        page.run("drawAll()")
        assert page.run(f"({SHOWN})('flash_attn3')") == 0
        assert page.run("[...document.querySelectorAll('tr[data-implementation=flash_attn3]')].every((row) => row.hidden)")
        page.click("figure.chart .legend [data-name=flash_attn3]")
        page.run("drawAll()")
        assert page.run(f"({SHOWN})('flash_attn3')") > 0
        page.click("#implementations [data-name=sdpa]", times=2)
        page.run("drawAll()")
        assert page.run("document.querySelectorAll('#implementations [aria-pressed=true]').length") == 1
        page.click("#everything")
        page.click("#workload")
        page.type("small")  # a preset's name
        page.run("drawAll()")
        assert page.run(
            "[...document.querySelectorAll('figure[data-chart=time] .panel:not([hidden]) h4')].map((e) => e.textContent)"
        ) == ["b8-h16-s512-d64-bf16"]
        assert not page.run("document.querySelector('figure[data-chart=matrix]').checkVisibility()")  # no empty frame stays
        assert page.run(EMPTY) == 0
        page.click("#theme")
        page.run("drawAll()")
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
        healthy(page)


def test_sweeps_and_histories_are_drawn_where_there_are_some(report):
    cases = [case(w, name, ms) for w, ms in ((SEED, 2.0), (SHORT, 0.1)) for name in ("sdpa", "mine")]
    again = [case(SEED, "sdpa", 2.2), case(SEED, "mine", 1.0, vs_sdpa=None, host_us=None)]
    with Page(
        report(document(*cases, day=1), document(*again, day=2), document(*cases, gpu="NVIDIA B200"), name="sweep")
    ) as page:
        page.run("drawAll()")
        found = page.run("[...document.querySelectorAll('figure.chart')].map((f) => `${f.dataset.section} ${f.dataset.chart}`)")
        lengths = {key for key in found if key.endswith("-length")}
        assert lengths == {f"{n} {key}" for n in (0, 1) for key in ("time-length", "tflops-length")}
        assert [key for key in found if key.endswith("history")] in (["0 history"], ["1 history"])
        assert page.run(EMPTY) == 0
        healthy(page)


def test_names_from_a_file_stay_names(report):
    evil = document(
        case(SEED, EVIL, 1.0, label=EVIL, chosen=EVIL), case(SEED, "sdpa", 2.0), case(CAUSAL, EVIL, 1.0), machine={"torch": EVIL}
    )
    evil["not_run"] = [{"workload": SEED, "implementation": EVIL, "reason": EVIL}]
    with Page(report(evil, name="evil")) as page:
        page.run("drawAll()")
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.run("document.querySelector('#implementations .chip').dataset.name") == EVIL
        box = page.run(f"({MIDDLE})(document.querySelector('figure[data-chart=time] .mark-symbol path'))")
        page.move(*box)
        page.wait(lambda: page.run("!!document.querySelector('#vg-tooltip-element.visible')"))
        assert EVIL in page.run("document.querySelector('#vg-tooltip-element').textContent")
        assert page.run("document.querySelectorAll('img').length") == 0
        healthy(page)
