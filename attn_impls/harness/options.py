"""The suite's command line: one table of options, each also an ini key of the same name (dashes as underscores)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

GROUP = "attention"
NEWEST = "newest"


class Option(NamedTuple):
    flag: str
    metavar: str
    help: str
    default: Any = None
    convert: Callable[[str], Any] | None = None  # None: a list; the option can be repeated and takes comma lists

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise ValueError
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def weights(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


def two(text: str) -> tuple[int, ...]:
    found = weights(text)
    if len(found) != 2:
        raise ValueError
    return found


def along(text: str) -> str:
    if text not in ALONG:
        raise ValueError
    return text


ALONG = ("auto", "heads", "rows")
EXPECTED = {
    positive: "a whole number above 0",
    natural: "a whole number, 0 or more, below 2^63",
    seconds: "a number of seconds above 0",
    str: "a word",
    weights: "whole numbers above 0, with commas between",
    two: "two whole numbers above 0, with a comma between",
    along: ", ".join(ALONG),
}

OPTIONS = (
    Option(
        "--workload",
        "NAME-OR-ID",
        "workload to run: a preset's name, a glob over the names, or an id such as b1-h32-s8192-d128-bf16",
    ),
    Option("--batch-size", "N", "override the batch size of the selected workloads (of 'seed', if none is)"),
    Option("--seq-len", "N", "override the query length; the KV length follows where it was the same"),
    Option("--kv-len", "N", "override the KV length"),
    Option("--embed-dim", "N", "set heads x head dim: alone or with --num-heads it sets the head dim, with --head-dim the heads"),
    Option("--num-heads", "N", "override the query heads; the KV heads follow where they were the same"),
    Option("--num-kv-heads", "N", "override the KV heads"),
    Option("--head-dim", "N", "override the head dim"),
    Option("--dtype", "NAME", "override the dtype: bf16, fp16, fp32"),
    Option("--mask", "NAME", "override the mask: full, causal"),
    Option(
        "--direction",
        "NAME",
        "direction to run: forward, backward (the gradients alone), forward+backward (default: forward is timed, all is checked)",
    ),
    Option("--impl", "NAME|FILE.py", "implementation to run: a registered name, or a Python file that registers some"),
    Option("--require-impl", "NAME", "implementation that must be able to run here: where it cannot, its cases fail"),
    Option(
        "--rounds",
        "N",
        "timed rounds of a case (default: on a GPU 20 to 100, on a CPU 7 to 100, by what a round takes)",
        None,
        positive,
    ),
    Option("--warmup-rounds", "N", "untimed rounds before them (default: 3 to 5 on a GPU, 100 ms on a CPU)", None, natural),
    Option("--device", "NAME", "auto, cuda or cpu (default: auto, cuda where there is one)", "auto", str),
    Option("--seed", "N", "seed of the inputs (default: 0)", 0, natural),
    Option("--form", "NAME", "form of a distributed strategy to run (default: all)"),
    Option(
        "--overlap-chunks",
        "N,N",
        "relative sizes of the chunks that overlap (default: 4,2,1,1)",
        (4, 2, 1, 1),
        weights,
    ),
    Option(
        "--overlap-along",
        "NAME",
        "what gather-copied cuts into chunks: heads, rows, or auto (default: auto, rows for the layout bshd, else heads)",
        "auto",
        along,
    ),
    Option("--overlap-streams", "N,N", "CUDA streams of gather-copied that compute, and that copy (default: 2,2)", (2, 2), two),
    Option("--pad-heads", "", "distributed: pad heads that the ranks cannot share evenly", False, bool),
    Option("--rank-timeout", "SECONDS", "how long ranks wait for one another (default: 180)", 180.0, seconds),
    Option("--case-timeout", "SECONDS", "end the run, naming the case, if one takes longer (default: 300)", 300.0, seconds),
)


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup(GROUP, "attention comparison")
    for option in OPTIONS:
        if option.convert is bool:
            group.addoption(option.flag, dest=option.name, action="store_true", default=None, help=option.help)
            parser.addini(option.name, option.help, type="bool", default=option.default)
            continue
        repeated = option.convert is None
        note = " (repeatable; comma lists)" if repeated else ""
        group.addoption(
            option.flag,
            dest=option.name,
            metavar=option.metavar,
            action="append" if repeated else "store",
            help=option.help + note,
        )
        if repeated:
            parser.addini(option.name, option.help, type="args", default=[])
        else:
            parser.addini(option.name, option.help, type="string", default=None)
    group.addoption(  # no ini key: it is about one run
        "--resume",
        metavar="JOURNAL",
        nargs="?",
        const=NEWEST,
        help="go on from the journal of a run that was killed, with the options it had (default: the newest)",
    )


def read_options(config: pytest.Config) -> dict[str, Any]:
    """The value of every option: the command line's, else the ini file's, else the default. Raises pytest.UsageError."""
    return {option.name: _value(config, option) for option in OPTIONS}


def _value(config: pytest.Config, option: Option) -> Any:
    given, ini = config.getoption(option.name), False
    if given is None:
        given, ini = config.getini(option.name), True
    if option.convert is bool:
        return given
    if option.convert is None:
        words = [_words(option, text) for text in given or []]
        return [_beside_ini(config, word) if ini and option.flag == "--impl" else word for part in words for word in part]
    if given in (None, ""):
        return option.default
    try:
        return option.convert(given)
    except ValueError:
        raise pytest.UsageError(f"{option.flag} {given!r}: give {EXPECTED[option.convert]}") from None


def _words(option: Option, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:  # an unset shell variable, which must not select everything
        raise pytest.UsageError(f"{option.flag} {text!r}: give {option.metavar}, or leave the option out")
    return words


def _beside_ini(config: pytest.Config, word: str) -> str:
    """A file that the ini file names stands beside it, as with pytest's own options."""
    is_file = word.endswith(".py") or "/" in word
    return str(config.inipath.parent / word) if is_file and config.inipath else word
