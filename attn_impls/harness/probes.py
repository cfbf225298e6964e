"""What an implementation takes an option to mean, asked with inputs whose answer is known in closed form."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..registry import Implementation, Unsupported
from ..workload import Workload
from .case import Broken, Case, CaseFailed, DeviceLost
from .replies import Closed, averages, beside_another, copies, heads, of_a_view, of_training, one_score
from .trial import QUESTIONS

TOO_SLOW = 20.0  # seconds that building a case may take before its implementation is asked nothing: a probe compiles as long
SLOW = 0.3  # seconds that an answer may take, building included, before what compiles is asked no more in a hurry


@dataclass(frozen=True)
class Probe:
    """A question: a workload, what an implementation makes of it, and the workloads that must not be timed if that is wrong."""

    name: str
    workload: Workload
    reply: Callable[[Case], str]  # "ok" or "wrong: …"; raises what the case does
    concerns: Callable[[Workload], bool]


def _w(text: str) -> Workload:
    return Workload.parse(text if "-fp" in text else f"{text}-bf16")


# sizes and options that a plan may be kept without; each has sizes of its own, for which nothing has been built before
PAIRS = tuple(
    (_w(one), _w(other))
    for one, other in (
        ("b1-h4kv2-s76-d64-causal-win4", "b1-h4kv2-s76-d64-causal-win12"),
        ("b1-h3-s44-d64-causal", "b1-h3-s44-d64"),
        ("b1-h3-s80-d64-scale144", "b1-h3-s80-d64-scale50"),
        ("b1-h3-s84-d64-cap1", "b1-h3-s84-d64-cap4"),
        ("b1-h3-s100-d64-causal", "b1-h3-s200-d64-causal"),
        ("b1-h4kv2-s60-d64-causal", "b1-h4-s60-d64-causal"),
        ("b1-h4kv2-s52-d64-causal", "b1-h4kv2-s52-d128-causal"),
        ("b1-h3-s54-d64-causal", "b1-h3-s54-d64-causal-fp32"),
        ("b1-h4kv2-s68-d64-causal", "b2-h4kv2-s68-d64-causal"),
        ("b1-h4kv2-q64kv128-d64-causal", "b1-h4kv2-q64kv192-d64-causal"),
        ("b1-h4kv2-s40-d64-causal-win4", "b1-h4kv2-s40-d64-causal"),
        ("b1-h3-s56-d64-scale144", "b1-h3-s56-d64"),
        ("b1-h3-s72-d64-cap2", "b1-h3-s72-d64"),
        ("b2-h3-q20kv77-d64", "b2-h3-q90kv77-d64"),
        ("b1-h3-q20kv140-d64-causal", "b1-h3-q84kv140-d64-causal"),
        ("b2-h4kv2-q1kv262-d64-causal", "b2-h4kv2-q1kv267-d64-causal"),
        ("b2-h4kv2-q1kv136-d64-causal", "b4-h4kv2-q1kv136-d64-causal"),
        ("b2-h8kv2-q1kv150-d64-causal", "b2-h8kv4-q1kv150-d64-causal"),
        ("b2-h4kv2-q1kv232-d128-causal-win50", "b2-h4kv2-q1kv232-d128-causal"),
    )
)
TRAINED = tuple(
    map(
        _w,
        (
            "b2-h6kv2-s36-d64-causal",
            "b1-h3-s48-d64",
            "b1-h3-s48-d64-causal-win4",
            "b1-h3-s48-d64-scale144",
            "b1-h3-s48-d64-cap2",
            "b1-h4kv2-s36-d128-causal",
            "b1-h3-s36-d64-causal-fp32",
        ),
    )
)
VIEWED = (_w("b2-h3-s24-d64"), _w("b2-h4kv2-q25kv37-d128-causal"), _w("b2-h4kv2-s21-d64-causal-fp32"))
PROBES = (
    Probe("layout", _w("b2-h2-s16-d64"), Closed(copies), lambda _w: True),
    Probe("default scale", _w("b1-h2-s16-d64"), Closed(one_score), lambda w: w.scale_dim == w.head_dim),
    Probe("causal", _w("b1-h2-s16-d64-causal"), Closed(averages), lambda w: w.causal),
    Probe("alignment", _w("b1-h2-q8kv16-d64-causal"), Closed(averages), lambda w: w.causal and w.offset > 0),
    Probe("blind rows", _w("b1-h2-q16kv8-d64-causal"), Closed(averages), lambda w: w.blind_rows > 0),
    Probe("window", _w("b1-h2-s16-d64-causal-win4"), Closed(averages), lambda w: w.window > 0),
    Probe("GQA", _w("b2-h6kv2-s16-d64"), Closed(heads), lambda w: w.group > 1),
    Probe("scale", _w("b1-h2-s16-d64-scale144"), Closed(one_score), lambda w: w.scale_dim != w.head_dim),
    Probe("softcap", _w("b1-h2-s16-d64-cap2"), Closed(one_score), lambda w: w.softcap > 0),
    # what is timed of these is judged by itself
    Probe("options kept", PAIRS[0][0], beside_another(PAIRS), lambda _w: False),
    Probe("gradients", TRAINED[0], of_training(TRAINED), lambda _w: False),
    Probe("dout as a view", VIEWED[0], of_a_view(VIEWED), lambda _w: False),  # what is timed has a contiguous one
)


def probe(implementation: Implementation, device: str, hurry: bool = False) -> dict[str, str]:
    """The answer to each probe: "ok", "unsupported: why", "raised: what" or "wrong: by how much".

    hurry: of what says that it compiles, after an answer that took longer than SLOW, and of all after TOO_SLOW, the others are
    "not asked: why". Raises Broken and DeviceLost.
    """
    answers: dict[str, str] = {}
    started, slow = time.perf_counter(), False
    for asked in PROBES:
        asking = time.perf_counter()
        if hurry and ((slow and implementation.compiles) or asking - started > TOO_SLOW):
            answers[asked.name] = "not asked: slow to build"
            continue
        answers[asked.name] = answer(asked, implementation, device)
        slow |= time.perf_counter() - asking > SLOW
    if QUESTIONS.mend():
        answers[PROBES[0].name] = "wrong: wrote outside its tensors, on the answers of probes"
    return answers


def answer(asked: Probe, implementation: Implementation, device: str) -> str:
    """The answer to one probe."""
    try:
        return asked.reply(Case(asked.workload, implementation, device))
    except Unsupported as reason:
        return f"unsupported: {reason}"
    except (Broken, DeviceLost):
        raise
    except CaseFailed as error:
        return f"raised: {str(error).splitlines()[0]}"


def ask(implementation: Implementation, device: str, build_seconds: float) -> dict[str, str]:
    """The answers before a first timing, in a hurry; none of an implementation whose case took longer than TOO_SLOW to build, or
    would have if its kernel were not cached."""
    if build_seconds > TOO_SLOW or implementation.compiles == "minutes":
        return dict.fromkeys((asked.name for asked in PROBES), "not asked: slow to build")
    return probe(implementation, device, hurry=True)


def brief(answers: dict[str, str]) -> str:
    """The answers in a few words: "7 ok, 2 unsupported", "wrong: window; 6 ok", "1 ok, 8 not asked"."""
    kinds: dict[str, list[str]] = {}
    for name, text in answers.items():
        kinds.setdefault(text.partition(":")[0], []).append(name)
    named = [f"{kind}: {', '.join(kinds[kind])}" for kind in ("wrong", "raised") if kind in kinds]
    counted = [f"{len(kinds[kind])} {kind}" for kind in ("ok", "unsupported", "not asked") if kind in kinds]
    return "; ".join([*named, ", ".join(counted)] if counted else named)


def objection(answers: dict[str, str], w: Workload | None = None) -> str:
    """The first answer that speaks against an implementation, with the probe's name, or "".

    w: a wrong one that matters to this workload; without, any that is wrong or raised.
    """
    for asked in PROBES:
        text = answers.get(asked.name, "")
        against = text.startswith("wrong") and (w is None or asked.concerns(w))
        if against or (w is None and text.startswith("raised")):
            return f"fails the probe {asked.name!r} ({asked.workload}): {text.removeprefix('wrong: ')}"
    return ""
