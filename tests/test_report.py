"""The report: what it says about saved runs, what it refuses, and that nothing in a file can break out of it."""

import json
import re
import time
from pathlib import Path

import pytest

from attn_impls import Workload
from attn_impls.__main__ import main
from attn_impls.harness.report import circumstances, command, load, tables
from attn_impls.harness.report.chart import Series
from attn_impls.harness.report.history import history
from attn_impls.harness.report.style import PALETTE, THEMES
from attn_impls.harness.summary import significant

H200 = sorted((Path(__file__).parent.parent / ".benchmarks" / "Linux-CPython-3.12-64bit").glob("000*h200*.json"))
SEED, CAUSAL, SHORT = "b1-h32-s8192-d128-bf16", "b1-h32-s8192-d128-causal-bf16", "b1-h32-s1024-d128-bf16"
EVIL = "</script><img src=x onerror=alert(1)>|`*"


def case(workload, implementation, ms, /, spread=0.001, **info):
    w = Workload.parse(workload)
    stats = {"median": ms / 1e3, "q1": ms / 1e3 * (1 - spread), "q3": ms / 1e3 * (1 + spread), "rounds": 20}
    facts = {"workload": workload, "implementation": implementation, "label": "", "timer": "device", "direction": "forward"}
    facts |= {"flops": w.flops(), "bytes": w.bytes(), "limit_s": 1e-4, "limit_bound": "compute", "limit_source": "datasheet"}
    facts |= {"percent_of_limit": 10 / ms, "error_over_budget": 0.3, "host_us": 40.0, "peak_bytes": 1 << 20, "vs_sdpa": 2 / ms}
    facts |= {"vs_sdpa_ci_low": 1.9 / ms, "vs_sdpa_ci_high": 2.1 / ms, "datasheet_tflops": 989.5, "datasheet_tb_per_s": 4.8}
    return {"stats": stats, "extra_info": facts | info}


def document(*cases, gpu="NVIDIA H200", day=1, **more):
    machine = {"gpu": gpu, "gpu_count": 1, "driver": "580", "cuda": "13.0", "cudnn": 91900, "torch": "2.11.0", "libraries": {}}
    return {
        "machine_info": machine | more.pop("machine", {}),
        "commit_info": {"id": "0123456789abcdef0123", "dirty": True},
        "benchmarks": list(cases),
        "datetime": f"2026-11-{day:02}T10:00:00+00:00",
        "version": "5.3.1",
    } | more


@pytest.fixture
def files(tmp_path):
    """`files(document, …)`: their paths, a.json, b.json, …"""

    def write(*documents):
        paths = [tmp_path / f"{'abcdefgh'[n]}.json" for n in range(len(documents))]
        for path, text in zip(paths, documents, strict=True):
            path.write_text(text if isinstance(text, str) else json.dumps(text))
        return [str(path) for path in paths]

    return write


def sections(*paths):
    return tables.sections(load.load(paths))


def cells(table):
    return [record.cells for record in table.records]


THREE = (case(SEED, "sdpa", 2.0), case(SEED, "fast", 1.0), case(SEED, "near", 1.02))
ONE = document(case(SEED, "sdpa", 2.0))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (json.dumps(ONE)[:-40], "is cut off, or not JSON"),
        ("\x00\x01", "is cut off, or not JSON"),
        ("[1, 2]", "is not a JSON file of pytest-benchmark"),
        ('{"benchmarks": 3}', "is not a JSON file of pytest-benchmark"),
        (ONE | {"commit_info": 3}, "is not a JSON file of pytest-benchmark"),
        (document({"stats": {}, "extra_info": {}}), "holds no result of this suite"),
        (document(), "holds no result of this suite"),
        (document({"stats": {"median": 1}, "extra_info": {"workload": SEED, "implementation": "x"}}), "benchmark 1 lacks 'q1'"),
        (
            document(THREE[0], {"stats": THREE[0]["stats"], "extra_info": {"workload": SEED}}),
            "benchmark 2 lacks 'implementation'",
        ),
        (document(case(SEED, "sdpa", float("nan"))), "median is nan"),
        (document(case(SEED, "sdpa", -1.0)), "median is -0.001"),
        (document(case(SEED, "sdpa", 1.0, host_us="fast")), "host_us is 'fast'"),
        (document(case(SEED, "sdpa", 1.0), not_run=[{"workload": SEED}]), "an entry of not_run lacks"),
    ],
)
def test_a_wrong_file_gets_one_clear_line(files, capsys, text, says):
    path = files(text)[0]
    assert main(["report", path, "--markdown"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert "a.json" in err


def damaged(value, at=()):
    """Copies of a document, each with one part gone or of another kind."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from damaged(value[key], (*at, key))
        yield (*at, key)


def test_damage_of_any_kind_never_ends_in_a_traceback(files, capsys):
    whole = document(case(SEED, "sdpa", 2.0), not_run=[{"workload": SEED, "implementation": "x", "reason": "y"}])
    paths = list(damaged(whole))
    assert len(paths) > 40
    for path in paths:
        for replacement in (None, "x", 3, [], {"a": 1}, True, 10**400):
            copy = json.loads(json.dumps(whole))
            part = copy
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = replacement
            code = main(["report", *files(copy), "--markdown"])
            assert (code, capsys.readouterr().err.count("\n")) in ((0, 0), (2, 1)), (path, replacement)


def test_a_wrong_wish_gets_one_clear_line(files, capsys, monkeypatch):
    path = files(ONE)[0]
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    for arguments, says in (
        ([path], "nothing was asked for: give -o FILE.html, --markdown or --plots DIR"),
        ([path, path, "--markdown"], "is given twice"),
        ([f"{path}.gone", "--markdown"], "cannot be read"),
        ([path, "-o", "x.html"], 'pip install "attn-impls[report]"'),
        ([path, "--plots", "x"], 'pip install "attn-impls[report]"'),
    ):
        assert main(["report", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert says in err
    assert main(["report", path, "--markdown"]) == 0  # which needs no library


def test_the_fastest_is_named_with_those_too_near_to_it(files):
    noisy = case(CAUSAL, "sdpa", 2.0, spread=0.2)
    (found,) = sections(*files(document(*THREE, case(CAUSAL, "fast", 1.5, spread=0.2), noisy)))
    seed, causal = cells(tables.winners(found))
    assert (seed[1], seed[2], seed[-1]) == ("fast", "1 ms", "≈ near")
    assert (causal[1], causal[-1]) == ("fast", "≈ sdpa")  # the quartiles overlap
    (alone,) = sections(*files(document(case(SEED, "sdpa", 2.0), case(SEED, "fast", 1.0))))
    assert cells(tables.winners(alone))[0][-1] == "sdpa (2 ×)"


def test_the_ranking_is_over_shared_workloads_alone(files):
    rows = (case(CAUSAL, "sdpa", 2.0), case(CAUSAL, "fast", 4.0))
    (found,) = sections(*files(document(*THREE, *rows)))
    ranking = tables.ranking(found)
    assert [row[1] for row in cells(ranking)] == ["fast", "near", "sdpa"]
    assert ranking.note.startswith(f"Geometric mean over the 1 of 2 workloads that all of these have: {SEED}.")
    means = {row[1]: row[2] for row in cells(ranking)}
    assert means["fast"] == "2.00×"  # 2 / 1 on SEED; its 0.5 on CAUSAL, which "near" lacks, does not count
    assert means["sdpa"] == "1.00×"
    (both,) = sections(
        *files(document(*(row for row in (*THREE, *rows) if row["extra_info"]["implementation"] in ("sdpa", "fast"))))
    )
    assert {row[1]: row[2] for row in cells(tables.ranking(both))}["fast"] == "1.00×"  # √(2 × 0.5)


def test_who_ran_on_few_workloads_is_not_ranked_and_takes_none_from_the_others(files):
    rows = (case(CAUSAL, "sdpa", 2.0), case(CAUSAL, "fast", 4.0), case(SHORT, "else", 1.0))
    (found,) = sections(*files(document(*THREE, *rows)))
    ranking = tables.ranking(found)
    assert {row[1] for row in cells(ranking)} == {"fast", "sdpa"}
    assert ranking.note.startswith(f"Geometric mean over the 2 of 3 workloads that all of these have: {SEED}, {CAUSAL}.")
    assert ranking.note.endswith("Not ranked, on too few workloads: near (1), else (1).")


def test_a_rate_is_of_what_limits_the_workload(files):
    memory = case(SEED, "sdpa", 2.0)
    memory["extra_info"]["limit_bound"] = "memory"
    (found,) = sections(*files(document(memory)))
    w = Workload.parse(SEED)
    assert cells(tables.winners(found))[0][3] == f"{significant(w.bytes('forward') / 2e-3 / 1e9)} GB/s"
    (found,) = sections(*files(document(case(SEED, "sdpa", 2.0))))
    assert cells(tables.winners(found))[0][3] == f"{significant(w.flops('forward') / 2e-3 / 1e12)} TFLOP/s"


def test_directions_and_devices_are_never_mixed(files):
    backward = case(SEED, "sdpa", 5.0, direction="backward")
    found = sections(*files(document(THREE[0], backward), document(THREE[1], gpu="NVIDIA B200")))
    assert {section.title for section in found} == {
        "NVIDIA H200 · forward",
        "NVIDIA H200 · backward",
        "NVIDIA B200 · forward",
    }
    assert all(len(section.rows) == 1 for section in found)


def test_the_newest_result_of_a_case_is_shown_and_versions_that_differ_are_said(files):
    old, new = document(case(SEED, "sdpa", 2.0), day=1), document(case(SEED, "sdpa", 3.0), day=2, machine={"torch": "2.12.0"})
    runs = load.load(files(new, old))
    assert [run.name for run in runs] == ["b", "a"]
    assert [row["ms"] for row in load.newest(runs)] == [pytest.approx(3.0)]
    assert circumstances.environment(runs).note == "torch differs on NVIDIA H200: 2.11.0 / 2.12.0"
    assert ("commit", *2 * ("0123456789ab, with local changes",)) in cells(circumstances.environment(runs))


def spread(ms, form="gather-copied", implementation="mine", size=2, **info):
    facts = {
        "strategy": "tensor",
        "form": form,
        "world_size": size,
        "efficiency": 1 / ms,
        "exposed_s": 1e-5,
        "speedup": size / ms,
    }
    facts |= {"speedup_ci_low": size / ms, "speedup_ci_high": size / ms, "padding_bound": 1.0}
    return case(SEED, implementation, ms, **facts | info)


COPIED = {"overlap_chunks": [4, 2, 1, 1], "overlap_along": "auto", "overlap_streams": [2, 2], "pad_heads": False}


@pytest.mark.parametrize(
    ("option", "other", "said"),
    [
        ("overlap_chunks", [1, 1], ["(chunks 1,1)", "(chunks 4,2,1,1)"]),
        ("overlap_along", "rows", ["(along auto)", "(along rows)"]),
        ("overlap_streams", [1, 1], ["(streams 1,1)", "(streams 2,2)"]),
    ],
)
def test_forms_that_were_run_otherwise_are_other_cases(files, option, other, said):
    first = document(spread(2.0, **COPIED), spread(3.0, form="core", pad_heads=False), day=1)
    runs = load.load(files(first, document(spread(1.0, **COPIED | {option: other}), day=2)))
    assert len(load.newest(runs)) == 3
    (found,) = tables.sections(runs)
    assert sorted(row[1] for row in cells(tables.winners(found))) == ["core", *(f"gather-copied {one}" for one in said)]
    assert sorted(row[1] for row in cells(tables.cases(found))) == ["core", *(f"gather-copied {one}" for one in said)]
    again = load.load(files(first, document(spread(1.0, **COPIED), day=2)))
    assert sorted(row["ms"] for row in load.newest(again)) == [pytest.approx(1.0), pytest.approx(3.0)]
    (alike,) = tables.sections(again)
    assert {row[1] for row in cells(tables.cases(alike))} == {"core", "gather-copied"}


def test_padded_heads_are_another_case_also_in_files_that_do_not_name_the_option(files):
    old = document(spread(2.0, form="core", padding_bound=0.75), day=1)
    new = document(spread(1.0, form="core", padding_bound=0.75, pad_heads=True), day=2)
    even = document(spread(3.0, form="core", pad_heads=False), day=3)
    assert sorted(row["ms"] for row in load.newest(load.load(files(old, new, even)))) == [pytest.approx(1.0), pytest.approx(3.0)]


def test_a_case_has_a_line_of_its_own_in_the_history_for_each_way_it_was_run(files):
    pytest.importorskip("altair", reason="the extra report is not installed")
    ways = (COPIED, COPIED | {"overlap_chunks": [1, 1]})
    runs = load.load(files(*(document(*(spread(ms + n, **way) for n, way in enumerate(ways)), day=ms) for ms in (1, 2))))
    (found,) = tables.sections(runs)
    drawn = history(found, Series(["mine"]), runs)
    assert {row["track"]: row["change"] for row in drawn.rows if row["run"] == "b"} == {
        f"{SEED} mine gather-copied 2 {chunks} auto 2,2": pytest.approx(change)
        for chunks, change in (("4,2,1,1", 1.0), ("1,1", 0.5))
    }


def test_reasons_stand_once_and_an_older_file_says_that_it_has_none(files):
    absent = [{"workload": w, "implementation": "gone", "reason": "gone: not installed"} for w in (SEED, CAUSAL)]
    run = document(THREE[0], case(CAUSAL, "sdpa", 1.0), THREE[1], not_run=absent)
    assert cells(circumstances.missing(load.load(files(run)))) == [("gone", "not installed", "everywhere", "NVIDIA H200")]
    del run["not_run"]
    assert cells(circumstances.missing(load.load(files(run)))) == [("fast", circumstances.UNKNOWN, CAUSAL, "NVIDIA H200")]


def test_doubtful_times_are_called_so(files):
    busy = case(SEED, "sdpa", 2.0, spread=0.2, percent_of_limit=140.0)
    (found,) = sections(*files(document(busy, case(SEED, "sage", 1.0, percent_of_limit=140.0, approximate=True))))
    assert [doubt.split()[0] for doubt in tables.doubts(found)] == ["1", "1"]
    assert tables.doubts(sections(*files(document(*THREE)))[0]) == []


def test_markdown_keeps_names_inside_their_cells(files, capsys):
    assert main(["report", *files(document(*THREE, case(SEED, EVIL, 0.5))), "--markdown"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "img" in line)
    assert row.replace(r"\|", "").count("|") == 8
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", out)


@pytest.mark.parametrize("paths", [H200[:1], H200[1:], H200], ids=["one", "ranks", "all"])
def test_markdown_of_the_saved_runs_names_the_known_winners(paths, capsys):
    assert main(["report", *map(str, paths), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "flash\\_attn3" in out
    assert ("1.48 ms" in out) == (paths != H200[1:])
    assert ("gather-overlapped" in out) == (paths != H200[:1])


def test_the_reasons_of_a_run_are_in_its_json_and_its_report(run_suite):
    arguments = ("--workload", "b1-h1-s16-d16-fp32", "--impl", "sdpa,flash_attn3", "--rounds", "5", "--benchmark-only")
    run = run_suite(*arguments, "--benchmark-json=run.json")
    assert run.code == 0, run.out + run.err
    stored = json.loads((run.cwd / "run.json").read_text())["not_run"]
    assert [(one["workload"], one["implementation"]) for one in stored] == [("b1-h1-s16-d16-fp32", "flash_attn3")]
    (shown,) = circumstances.missing(load.load([str(run.cwd / "run.json")])).records
    assert shown.cells[:3] == ("flash_attn3", stored[0]["reason"].removeprefix("flash_attn3: "), "everywhere")


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_reads_and_series_stand_out(theme):
    colours = THEMES[theme]
    for paper in ("paper", "card"):
        assert all(contrast(colours[text], colours[paper]) >= 4.5 for text in ("ink", "soft", "accent", "good", "bad"))
        assert all(contrast(colour, colours[paper]) >= 3 for colour in PALETTE)
    for cell in ("slower", "even", "faster", "little", "much"):  # whose text is black or white
        assert max(contrast(colours[cell], text) for text in ("#000000", "#ffffff")) >= 4.5


@pytest.mark.slow
def test_charts_as_files_and_none_without_data(files, tmp_path):
    pytest.importorskip("altair", reason="the extra report is not installed")
    assert main(["report", *files(document(*THREE)), "--plots", str(tmp_path / "plots")]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    charts = {name.removeprefix("nvidia-h200-forward-") for name in names}
    assert charts == {f"{c}.{end}" for c in ("speed-up", "time", "roofline-bf16", "error", "host") for end in ("svg", "png")}
    assert (tmp_path / "plots" / "nvidia-h200-forward-time.png").read_bytes().startswith(b"\x89PNG")
    times, roofline = (
        (tmp_path / "plots" / f"nvidia-h200-forward-{chart}.svg").read_text() for chart in ("time", "roofline-bf16")
    )
    assert all(text in times for text in (SEED, "fast", "1.02 ms", "stroke-dasharray"))
    assert "datasheet: 989.5 TFLOP/s, 4.8 TB/s" in roofline
    assert "undefined" not in times + roofline


@pytest.mark.slow
def test_two_thousand_cases_in_ten_seconds_and_fifteen_megabytes(files, tmp_path):
    pytest.importorskip("altair", reason="the extra report is not installed")
    lengths = [128 * (n + 1) for n in range(50)]
    many = [case(f"b{b}-h8-s{s}-d64-bf16", f"kernel_{n}", 0.1 + n) for b in (1, 2) for s in lengths for n in range(20)]
    paths = files(document(*many))
    started = time.process_time()
    assert main(["report", *paths, "-o", str(tmp_path / "report.html")]) == 0
    assert time.process_time() - started <= 10  # of the CPU, which other work may share
    assert (tmp_path / "report.html").stat().st_size <= 15e6
