"""The progress behind pytest's own output: what it says, and that it is gone from whatever is printed after it."""

import os
import re
import subprocess
import sys

import pytest

from attn_impls.harness.progress import ERASE, RESTORE, SAVE, Progress, duration

ID = "b1-h2-s32-d16-fp32"
RUN = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--device=cpu", "--workload", ID, "--impl=sdpa,handcrafted",
       "--rounds=3", "--warmup-rounds=1", "--benchmark-only")  # fmt: skip


@pytest.fixture(scope="module")
def on_terminal(suite_copy, suite_environment):
    """What a run writes to a terminal of 100 columns."""

    def run(*arguments, term="xterm"):
        ours, theirs = os.openpty()
        environment = suite_environment({"TERM": term, "COLUMNS": "100"})
        command = [sys.executable, "-m", "pytest", *RUN, *arguments]
        process = subprocess.Popen(
            command, cwd=suite_copy(), env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        written = b""
        while chunk := _read(ours):
            written += chunk
        os.close(ours)
        assert process.wait() == 0, written.decode()
        return written.decode()

    return run


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def screen(written):
    """The lines that remain, as a terminal shows them."""
    lines, column, saved = [[]], 0, 0
    for token in re.findall(r"\x1b\[[\d;]*[A-Za-z]|\x1b.|[\s\S]", written):
        line = lines[-1]
        if token == SAVE:
            saved = column
        elif token == RESTORE:
            column = saved
        elif token == ERASE:
            del line[column:]
        elif token == "\n":
            lines.append([])
            column = 0
        elif token == "\r":
            column = 0
        elif not token.startswith("\x1b"):
            line[column : column + 1] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]


@pytest.mark.slow
def test_progress_is_shown_and_nothing_of_it_remains(on_terminal):
    written = on_terminal()
    assert f"0/2 cases · {ID}-sdpa{RESTORE}" in written
    assert re.search(rf"1/2 cases · \d+ s left · {ID}-handcrafted", written)
    shown = screen(written)
    assert not any("cases ·" in line for line in shown)
    (line,) = (line for line in shown if line.startswith("tests/test_benchmark.py"))
    assert re.fullmatch(r"tests/test_benchmark\.py \.\. +\[100%\]", line)


@pytest.mark.slow
def test_verbose_lines_are_whole(on_terminal):
    written = on_terminal("-v")
    shown = [re.sub(" +", " ", line) for line in screen(written) if "::test_forward" in line]
    test = f"tests/test_benchmark.py::test_forward[{ID}"
    assert shown == [f"{test}-sdpa] PASSED [ 50%]", f"{test}-handcrafted] PASSED [100%]"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("-q",), ("-s",)])
def test_progress_is_quiet_where_it_should_be(on_terminal, arguments):
    assert "cases ·" not in on_terminal(*arguments)


@pytest.mark.slow
def test_no_progress_on_a_dumb_terminal(on_terminal):
    assert "cases ·" not in on_terminal(term="dumb")


def test_no_progress_without_a_terminal(run_suite):
    run = run_suite(*RUN, env={"TERM": "xterm"})
    assert run.code == 0
    assert "cases ·" not in run.out
    assert "\x1b" not in run.out


@pytest.fixture
def progress():
    ours = Progress(config=None, resumed={"t[old-a]"})
    ours.names = {"t[old-a]": "a", "t[one-a]": "a", "t[one-b]": "b", "t[two-a]": "a", "t[two-b]": "b"}
    return ours


def test_time_left_is_what_each_implementation_took(progress):
    assert progress.text("t[one-a]") == "0/5 cases · one-a"
    progress.done |= {"t[old-a]", "t[one-a]"}
    progress.seconds = {"a": [10.0]}
    assert progress.seconds_left() == 30  # a once, b twice, as long as a for all that is known
    progress.done |= {"t[one-b]"}
    progress.seconds["b"] = [100.0]
    assert progress.seconds_left() == 110
    assert progress.text("t[two-a]") == "3/5 cases · 2 min left · two-a"


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s left"), (89, "89 s left"), (150, "2 min left"), (7200, "2.0 h left")])
def test_durations(seconds, text):
    assert duration(seconds) == text
