"""Results that survive a kill, and the commands around them."""

import json
import subprocess
import sys
import time

import pytest
from fakes import HEADER, WORKLOAD, finished_case

from attn_impls.__main__ import main
from attn_impls.harness import journal
from attn_impls.harness.journal import KEEP, Journal, read, write_json
from attn_impls.harness.sides import Side


def written(folder, *names):
    """The path of a journal with cases of these names."""
    ours = Journal(folder)
    for name in names:
        ours.add(HEADER, finished_case(name))
    return ours.path


def error_of(path):
    with pytest.raises(ValueError, match="journal") as found:
        read(path)
    assert type(found.value) is ValueError
    assert path.name in str(found.value)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_nothing_is_written_before_the_first_case(tmp_path):
    ours = Journal(tmp_path / "deep" / "journal")
    assert list(tmp_path.iterdir()) == []
    assert (ours.path, ours.finished) == (None, 0)
    ours.add(HEADER, finished_case("one"))
    assert [ours.path] == list((tmp_path / "deep" / "journal").iterdir())


def test_every_case_is_on_disk_as_soon_as_it_is_added(tmp_path):
    ours = Journal(tmp_path)
    for n in range(1, 4):
        ours.add(HEADER, finished_case(f"impl{n}"))
        assert ours.finished == n
        assert read(ours.path) == {**HEADER, "benchmarks": [finished_case(f"impl{k}") for k in range(1, n + 1)], "not_run": []}


def test_a_journal_holds_why_cases_did_not_run_unless_a_later_run_finished_them(tmp_path):
    ours = Journal(tmp_path)
    cells = [{"workload": WORKLOAD, "direction": "forward", "implementation": name, "reason": "why"} for name in ("a", "b", "c")]
    ours.leave_out(cells[0])
    assert ours.path is None  # with nothing finished there is nothing to keep
    ours.add(HEADER, finished_case("one"))
    for cell in cells[1:]:
        ours.leave_out(cell)
    assert (ours.finished, read(ours.path)["not_run"]) == (1, cells)
    later = Journal(tmp_path)
    later.go_on(ours.path)
    assert later.finished == 1
    later.leave_out(cells[2] | {"reason": "still"})
    finished = finished_case("b")
    finished["extra_info"]["direction"] = "forward"
    later.add(HEADER, finished)
    found = read(later.path)
    assert found["not_run"] == [cells[0], cells[2] | {"reason": "still"}]
    assert found["benchmarks"] == [finished_case("one"), finished]


def test_what_json_does_not_know_is_written_as_text(tmp_path):
    ours = Journal(tmp_path)
    ours.add(HEADER, finished_case("one") | {"params": {"workload": tmp_path}})
    assert read(ours.path)["benchmarks"][0]["params"] == {"workload": str(tmp_path)}


@pytest.mark.parametrize("text", ["two\nlines", "µs → ✓", "\u2028\x85\x0c", '"}'])
def test_text_cannot_break_a_line(tmp_path, text):
    ours = Journal(tmp_path)
    for _ in range(2):
        ours.add(HEADER, finished_case("one") | {"group": text})
    assert [benchmark["group"] for benchmark in read(ours.path)["benchmarks"]] == [text, text]


@pytest.mark.parametrize("cut", [1, 2, 30, 10_000])
def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    path = written(tmp_path, "one", "two", "three")
    lines = path.read_bytes().splitlines(keepends=True)
    kept = lines[-1][: -min(cut, len(lines[-1]))]
    path.write_bytes(b"".join(lines[:-1]) + kept)
    whole = ["one", "two", "three"] if cut == 1 else ["one", "two"]  # a cut that takes the line's end only loses nothing
    assert [benchmark["extra_info"]["implementation"] for benchmark in read(path)["benchmarks"]] == whole


def test_a_header_cut_by_a_kill_is_an_error(tmp_path):
    path = written(tmp_path, "one")
    path.write_bytes(path.read_bytes()[:40])
    assert "header" in error_of(path)


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("damage", ["", "{", "\x00\x00", '{"group": "b1'])
def test_a_damaged_line_before_the_last_is_an_error(tmp_path, line, damage):
    path = written(tmp_path, "one", "two", "three")
    lines = path.read_text().splitlines()
    lines[line] = damage
    path.write_text("\n".join(lines) + "\n")
    assert "not a journal" in error_of(path)


@pytest.mark.parametrize("line", ["null", '"text"', "{}"])
def test_a_line_that_is_no_benchmark_is_an_error(tmp_path, line):
    path = written(tmp_path, "one", "two", "three")
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    assert "not a journal" in error_of(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello\nworld\n",
        b"[1, 2]\n[3]\n",
        b"3\n",
        b"null\n",
        b'{"benchmarks": []}\n',
        b'{"header": 3}\n',
        b'{"header": null}\n',
        b'{"header": ["machine_info"]}\n',
        bytes(range(256)),
        b"\x80\x04\x95pickle",
        b"\xff\xfe{\x00",
    ],
)
def test_a_foreign_file_is_an_error(tmp_path, content):
    path = tmp_path / "foreign.jsonl"
    path.write_bytes(content)
    assert "not a journal" in error_of(path)


def test_pytest_benchmark_s_own_json_is_not_a_journal(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {**HEADER, "benchmarks": [finished_case("one")]})
    assert "not a journal" in error_of(path)


def test_an_absent_file_and_a_folder_are_errors(tmp_path):
    assert "No such file" in error_of(tmp_path / "absent.jsonl")
    assert "cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize("old", [0, 1, KEEP - 1, KEEP, KEEP + 7])
def test_the_newest_journals_are_kept(tmp_path, old):
    names = [f"20250101T0000{n:02}-1.jsonl" for n in range(old)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    path = written(tmp_path, "one", "two")
    left = sorted(file.name for file in tmp_path.glob("*.jsonl"))
    assert left == [*names[max(0, old - KEEP + 1) :], path.name]
    assert (tmp_path / "notes.txt").exists()


def test_a_gate_s_runs_leave_their_journals_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv(journal.FOLDER_VARIABLE, raising=False)
    assert journal.folder(tmp_path) == tmp_path / ".benchmarks" / "journal"
    side = Side("baseline", "HEAD", tmp_path)
    monkeypatch.setenv(journal.FOLDER_VARIABLE, side._environment(tmp_path / "gate")[journal.FOLDER_VARIABLE])
    assert journal.folder(tmp_path) == tmp_path / "gate" / "journals"


def test_journals_sort_by_their_age(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 9, 30, 23, 59, 59, 2, 273, 0)))
    first = written(tmp_path, "one")
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 10, 1, 0, 0, 0, 3, 274, 0)))
    assert sorted([written(tmp_path, "one"), first])[0] == first


def test_write_json_writes_whole_documents(tmp_path):
    path = tmp_path / "deep" / "run.json"
    write_json(path, {"a": [1, {"µ": tmp_path}]})
    assert json.loads(path.read_text()) == {"a": [1, {"µ": str(tmp_path)}]}
    write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["dumps", "replace"])
def test_a_failed_write_leaves_the_old_document_and_no_part_of_the_new(tmp_path, monkeypatch, failing):
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"dumps": (journal.json, "dumps"), "replace": (journal.Path, "replace")}[failing], fail)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_becomes_what_pytest_benchmark_would_have_written(tmp_path, capsys):
    path, output = written(tmp_path, "one", "two"), tmp_path / "deep" / "run.json"
    assert main(["journal", str(path), "-o", str(output)]) == 0
    assert json.loads(output.read_text()) == {**HEADER, "benchmarks": [finished_case("one"), finished_case("two")], "not_run": []}
    assert capsys.readouterr().out == f"2 finished cases: {output}\n"


@pytest.mark.slow
def test_pytest_benchmark_compares_a_journal(tmp_path):
    ours, output = Journal(tmp_path / "journal"), tmp_path / "run.json"
    ours.add(HEADER, finished_case("slow", 4e-4))
    ours.add(HEADER, finished_case("fast", 1e-4))
    with ours.path.open("a") as file:
        file.write('{"group": "cut by a ki')
    assert main(["journal", str(ours.path), "-o", str(output)]) == 0
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "run.json", "--columns=median,rounds", "--sort=min"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("test_forward[")]
    assert [(row[0].split("-")[-1].split("]")[0], *row[1:]) for row in rows] == [
        ("fast", "100.0000", "(1.0)", "2"),
        ("slow", "400.0000", "(4.00)", "2"),
    ]


@pytest.mark.parametrize("content", [b"hello\nworld\n", b"\x80\x81", b"", b'{"header": 3}\n', None])
def test_a_bad_journal_ends_with_2_and_writes_nothing(tmp_path, fails, content):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert "bad.jsonl" in fails("journal", path, "-o", tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


def test_an_output_that_cannot_be_written_ends_with_2(tmp_path, fails):
    path, folder = written(tmp_path / "journal", "one"), tmp_path / "folder"
    folder.mkdir()
    fails("journal", path, "-o", folder)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "journal"]


def test_list_names_presets_and_implementations(capsys):
    assert main(["list"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "b1-h32-s8192-d128-bf16"] in [line[:2] for line in words]
    assert {"sdpa", "handcrafted", "flash_attn3"} <= {line[0] for line in words}
    assert "torch" in next(line for line in words if line[0] == "sdpa")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["journal"], ["journal", "a.jsonl"], ["show"]])
def test_a_malformed_command_line_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m attn_impls" in capsys.readouterr().err


@pytest.mark.slow
def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "attn_impls", "show", str(tmp_path / "absent.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"python -m attn_impls show: [Errno 2] No such file or directory: {command[-1]!r}"]
