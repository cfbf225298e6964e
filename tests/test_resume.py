"""--resume, end to end: what a killed run had finished is in the final results once, and what may not be mixed is refused."""

import json
import re
import shutil

import pytest

from attn_impls.harness import resume
from attn_impls.harness.selection import Selection

FIRST, SECOND = "b1-h2-s32-d16-fp32", "b1-h2-s48-d16-fp32"
MINE = """
import os, signal
from pathlib import Path
from torch.nn.functional import scaled_dot_product_attention as f
from attn_impls import attention

@attention("mine")
def mine(w):
    with open("built", "a") as file:
        print(w, file=file)
    if w.q_len == 48 and not Path("dead").exists():
        Path("dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda q, k, v: f(q, k, v, is_causal=w.causal)
"""
IMPLS = ("sdpa", "mine", "handcrafted")
ALL = [f"{identity}-{name}" for identity in (FIRST, SECOND) for name in IMPLS]
FINISHED = ALL[:4]  # the kill comes in the fifth
RUN = ("--benchmark-only", "--workload", f"{FIRST},{SECOND}", "--impl", "sdpa,./mine.py,handcrafted")
QUICK = ("--rounds", "4", "--warmup-rounds", "1")


def journals(folder):
    return sorted((folder / ".benchmarks" / "journal").glob("*.jsonl"))


def measured(path):
    """The cases of a journal, by id."""
    return {case["param"]: case for case in map(json.loads, path.read_text().splitlines()[1:])}


@pytest.fixture(scope="module")
def killed(run_suite, suite_copy):
    """The folder of a run that `kill -9` ended in the middle."""
    folder = suite_copy({"mine.py": MINE})
    run = run_suite(*RUN, *QUICK, "--benchmark-json=run.json", cwd=folder)
    assert run.code == -9
    assert not (folder / "run.json").exists()
    (journal,) = journals(folder)
    assert list(measured(journal)) == FINISHED
    return folder


@pytest.fixture
def folder(killed, tmp_path):
    """A copy of it, to go on in."""
    return shutil.copytree(killed, tmp_path / "suite")


@pytest.fixture(scope="module")
def resumed(run_suite, killed, tmp_path_factory):
    folder = shutil.copytree(killed, tmp_path_factory.mktemp("resumed") / "suite")
    return run_suite(*RUN, *QUICK, "--benchmark-json=run.json", "--benchmark-save=x", "--resume", cwd=folder)


def test_every_case_is_there_once(resumed, killed):
    assert resumed.code == 0, resumed.out + resumed.err
    document = json.loads((resumed.cwd / "run.json").read_text())
    assert [case["param"] for case in document["benchmarks"]] == ALL
    before = measured(*journals(killed))
    for name, case in resumed.results.items():
        assert case["extra_info"].pop("resumed", False) == (name in FINISHED)
        if name in FINISHED:
            assert case == before[name]


def test_finished_cases_are_not_run_again(resumed, killed):
    before, after = ((folder / "built").read_text().split() for folder in (killed, resumed.cwd))
    assert after[: len(before)] == before
    assert set(after[len(before) :]) >= {SECOND}
    assert FIRST not in after[len(before) :]
    assert re.search(r"2 passed, .*4 resumed", resumed.out)


def test_saved_runs_hold_them_too(resumed):
    (saved,) = resumed.cwd.glob(".benchmarks/*/*_x.json")
    assert [case["param"] for case in json.loads(saved.read_text())["benchmarks"]] == ALL


def test_the_journal_goes_on(resumed):
    (journal,) = journals(resumed.cwd)
    assert list(measured(journal)) == ALL


def test_summary_marks_them(resumed):
    rows = [line.split() for line in resumed.table.splitlines()]
    marked = [row[0] for row in rows if row[:1] and row[0] in IMPLS and "↺" in row[1:4]]
    assert sorted(marked) == ["handcrafted", "mine", "sdpa", "sdpa"]
    assert "↺ measured by the run that this one resumed" in resumed.table
    assert "4 finished cases in it are not run again" in resumed.out


def test_a_run_that_had_finished_runs_nothing(run_suite, resumed):
    run = run_suite(*RUN, *QUICK, "--benchmark-json=again.json", "--resume", "-q", cwd=resumed.cwd)
    assert (run.code, "6 resumed" in run.out) == (0, True)
    assert len(json.loads((run.cwd / "again.json").read_text())["benchmarks"]) == 6


def test_a_cut_last_line_is_run_again(run_suite, folder):
    (journal,) = journals(folder)
    journal.write_bytes(journal.read_bytes()[:-40])
    run = run_suite(*RUN, *QUICK, "--benchmark-json=run.json", f"--resume={journal}", cwd=folder)
    assert run.code == 0, run.out + run.err
    assert re.search(r"3 passed, .*3 resumed", run.out)
    assert list(run.results) == list(measured(journal)) == ALL


def change(journal, **changes):
    """Rewrite the journal's first line."""
    first, _, rest = journal.read_text().partition("\n")
    head = json.loads(first)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = head
        for parent in parents:
            target = target[parent]
        target[last] = value
    journal.write_text(json.dumps(head) + "\n" + rest)


# what is changed in the journal, or given beside: what is said
REFUSED = {
    "another GPU": ({"header__machine_info__gpu": "NVIDIA H200"}, (), "was made on NVIDIA H200"),
    "another torch": ({"header__machine_info__torch": "1.0"}, (), "was made with torch 1.0, now"),
    "more threads": ({"header__machine_info__threads": 64}, (), "was made with threads 64, now 1"),
    "several ranks": ({"header__machine_info__world_size": 2}, (), "was made with world_size 2, now not given"),
    "another commit": ({"header__commit_info__id": "abc"}, (), "was made with commit abc, now"),
    "other rounds": ({}, ("--rounds=5",), "was made with --rounds 4, now 5"),
    "another seed": ({}, ("--seed=1",), "was made with --seed 0, now 1"),
    "another source of the package": ({"package": "0"}, (), "was made before the source of attn_impls changed"),
    "another source": ({"sources__mine": "0"}, (), "was made before the source of 'mine' changed"),
    "an older journal": ({"options": None}, (), "does not say with which options and sources"),
    "a journal without the package": ({"package": None}, (), "does not say with which options and sources"),
}


def test_sources_stand_one_by_one_where_they_are_not_the_package_s(killed):
    (journal,) = journals(killed)
    first, *_ = journal.read_text().splitlines()
    assert list(json.loads(first)["sources"]) == ["mine"]


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (lambda folder: (folder / "harness" / "clock.py").write_text("b"), False),
        (lambda folder: (folder / "harness" / "clock.py").rename(folder / "harness" / "time.py"), False),
        (lambda folder: (folder / "harness" / "clock.py").rename(folder / "clock.py"), False),
        (lambda folder: (folder / "new.py").touch(), False),
        (lambda folder: (folder / "notes.txt").touch(), True),
        (lambda folder: (folder / ".#sdpa.py").symlink_to("me@here.1"), True),  # an editor's
    ],
    ids=["edited", "renamed", "moved", "added", "no source", "a lock"],
)
def test_the_package_s_digest_is_of_all_its_sources(tmp_path, monkeypatch, edit, same):
    (tmp_path / "harness").mkdir()
    for name in ("sdpa.py", "harness/clock.py"):
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(resume, "PACKAGE", tmp_path)
    nothing = Selection("cpu", (), ())
    before = resume.here(nothing)["package"]
    assert before == resume.here(nothing)["package"]
    edit(tmp_path)
    assert (resume.here(nothing)["package"] == before) == same


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_other_conditions_are_refused(run_suite, folder, what):
    changes, arguments, said = REFUSED[what]
    (journal,) = journals(folder)
    change(journal, **changes)
    before = journal.read_bytes()
    run = run_suite(*RUN, *QUICK, *arguments, "--benchmark-json=run.json", "--resume", cwd=folder)
    assert (run.code, len(run.errors)) == (4, 1), run.err
    assert run.err.startswith(f"ERROR: --resume: {journal.name} ")
    assert said in run.err
    assert journal.read_bytes() == before
    assert not (folder / "run.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no journal"), ("", "not a journal"), ("hello\n", "not a journal"), ('{"header": {}}\n', "not a journal")],
)
def test_what_is_no_journal_is_one_line(run_suite, suite_copy, content, said):
    folder = suite_copy()
    if content is not None:
        (folder / ".benchmarks" / "journal").mkdir(parents=True)
        (folder / ".benchmarks" / "journal" / "1.jsonl").write_text(content)
    run = run_suite("--benchmark-only", "--resume", cwd=folder)
    assert (run.code, len(run.errors)) == (4, 1), run.err
    assert said in run.err


def test_resume_under_xdist_is_refused(run_suite, folder):
    run = run_suite(*RUN, "-n", "2", "--resume", cwd=folder)
    assert (run.code, len(run.errors)) == (4, 1)
    assert "pytest-xdist" in run.err
