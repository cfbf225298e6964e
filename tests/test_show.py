"""`python -m attn_impls show`: the tables of a saved run, and what it says of files that are none."""

import json

import pytest
from fakes import HEADER, WORKLOAD, finished_case

from attn_impls.__main__ import main
from attn_impls.harness.journal import write_json


def test_show_prints_the_table_of_a_saved_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_json(tmp_path / "run.json", {**HEADER, "benchmarks": [finished_case("slow", 4e-4), finished_case("fast", 1e-4)]})
    assert main(["show", str(tmp_path / "run.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CPU: Fake CPU · torch threads: 2"
    assert any(line.startswith(WORKLOAD) for line in lines)
    assert [line.split()[0] for line in lines if "✓ 0.25" in line] == ["fast", "slow"]


def test_show_leaves_out_what_is_not_ours(tmp_path, capsys):
    other = finished_case("other") | {"extra_info": {}}
    write_json(tmp_path / "run.json", {**HEADER, "benchmarks": [other, finished_case("fast")]})
    assert main(["show", str(tmp_path / "run.json")]) == 0
    assert "other" not in capsys.readouterr().out


def cell(name, reason, **place):
    """An entry of a document's not_run."""
    return {"workload": WORKLOAD, "direction": "forward", **place, "implementation": name, "reason": reason}


def shown(tmp_path, capsys, document):
    write_json(tmp_path / "run.json", document)
    assert main(["show", str(tmp_path / "run.json")]) == 0
    return capsys.readouterr().out.splitlines()


def test_show_says_why_cases_did_not_run(tmp_path, capsys):
    cells = [cell("wrong", "FAILED: differs from SDPA"), cell("absent", "absent: not installed")]
    cells.append(cell("fast", "fast: forward only", direction="backward"))
    lines = shown(tmp_path, capsys, {**HEADER, "benchmarks": [finished_case("fast")], "not_run": cells})
    forward, backward = (next(n for n, line in enumerate(lines) if line.startswith(f"{WORKLOAD} {text}")) for text in (" ", "b"))
    for reason in ("  absent  not installed", "  wrong   FAILED: differs from SDPA"):
        assert forward < lines.index(reason) < backward
    assert lines[backward : backward + 2] == [f"{WORKLOAD} backward", "  fast  forward only"]


def test_show_says_why_cells_of_a_distributed_run_are_empty(tmp_path, capsys):
    spread = finished_case("sdpa")
    spread["extra_info"] |= {"direction": "forward", "label": "", "form": "core", "imbalance": 1.0, "slowest_rank": 0}
    spread["extra_info"] |= {"speedup": None}
    info = {**HEADER["machine_info"], "world_size": 2, "backend": "gloo", "nccl": None, "topology": "1 node, CPU processes"}
    cells = [cell("sdpa", "FAILED: differs from the oracle", form="gather"), cell("mine", "mine: no GQA", form="core")]
    lines = shown(tmp_path, capsys, {**HEADER, "machine_info": info, "benchmarks": [spread], "not_run": cells})
    assert {"  gather × sdpa: FAILED: differs from the oracle", "  core × mine: no GQA"} <= set(lines)


INCOMPLETE = {"group": "b", "stats": {"median": 1.0, "iqr": 0.0}, "extra_info": {"workload": WORKLOAD}}


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        3,
        "text",
        {},
        {"benchmarks": []},
        {"benchmarks": None, "machine_info": {}},
        {"benchmarks": [3], "machine_info": {}},
        {"benchmarks": [{}], "machine_info": {}},
        {**HEADER, "benchmarks": []},
        {**HEADER, "benchmarks": [finished_case("one") | {"extra_info": {}}]},
        {**HEADER, "benchmarks": [finished_case("one")], "not_run": 3},
        {**HEADER, "benchmarks": [finished_case("one")], "not_run": [{"workload": WORKLOAD}]},
        {**HEADER, "benchmarks": [finished_case("one")], "machine_info": None},
        {**HEADER, "benchmarks": [finished_case("one")], "machine_info": []},
        {**HEADER, "benchmarks": [finished_case("one")], "machine_info": {"cpu": "text"}},
        {**HEADER, "benchmarks": [INCOMPLETE]},
        {**HEADER, "benchmarks": [INCOMPLETE | {"extra_info": {"workload": "somebody-else-s"}}]},
        {**HEADER, "benchmarks": [INCOMPLETE | {"extra_info": {"workload": None}}]},
        {**HEADER, "benchmarks": [{"extra_info": {"workload": WORKLOAD}}]},
    ],
)
def test_show_of_something_else_ends_with_2(tmp_path, fails, document):
    (tmp_path / "run.json").write_text(json.dumps(document))
    fails("show", tmp_path / "run.json")


@pytest.mark.parametrize("content", [b"", b"{", b"hello", b"\x80\x81", None])
def test_show_of_what_is_not_json_ends_with_2_and_names_the_file(tmp_path, fails, content):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    assert "run.json" in fails("show", path)
