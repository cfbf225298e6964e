"""What an implementation takes an option to mean, asked with inputs whose answer is known in closed form."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..registry import Implementation, Kernel, Unsupported
from ..workload import Workload
from . import backward, gradients
from .case import Broken, Case, CaseFailed, DeviceLost, build, call
from .inputs import Inputs, as_layout, plain, transposed_in_memory
from .oracle import attend

TOO_SLOW = 20.0  # seconds that building a case may take before its implementation is asked nothing: a probe compiles as long
SLOW = 0.3  # seconds that an answer may take, building included, before an implementation in a hurry is asked no more
APPROXIMATE = 0.05


@dataclass(frozen=True)
class Probe:
    """A question: a workload, what an implementation makes of it, and the workloads that must not be timed if that is wrong."""

    name: str
    workload: Workload
    reply: Callable[[Case], str]  # "ok" or "wrong: …"; raises what the case does
    concerns: Callable[[Workload], bool]
    in_a_hurry: bool = False  # asked then, too, of who does not compile for it


@dataclass(frozen=True)
class Closed:
    """The reply to inputs whose exact output is known. ask: q, k, v and out, bhsd, float64."""

    ask: Callable[[Workload], tuple[Tensor, Tensor, Tensor, Tensor]]

    def __call__(self, case: Case) -> str:
        w, layout = case.workload, case.implementation.layout
        q, k, v, right = self.ask(w)
        inputs = Inputs(*(t.to(w.dtype).to(case.device) for t in (q, k, v))).as_layout(layout)
        kernel, _ = build(case, inputs)
        out = call(case, kernel, inputs)
        out = (out.transpose(1, 2) if layout == "bshd" else out).double().cpu()
        unit = APPROXIMATE if case.implementation.approximate else 2 * torch.finfo(w.dtype).eps
        wrong = ~((out - right).abs() <= unit * (right.abs() + 0.1))  # NaN is wrong
        if not bool(wrong.any()):
            return "ok"
        first = tuple(wrong.nonzero()[0].tolist())
        return f"wrong: {int(wrong.sum())} of {wrong.numel()} values, at {list(first)} {out[first]:.4g} for {right[first]:.4g}"


def of_a_view(case: Case) -> str:
    """The reply to a dout that lies in memory as the other layout has it, as it does behind an output projection.

    Asked after a contiguous one, of sizes of its own: a library may have kept what it found out about the memory of the first.
    """
    w, layout = case.workload, case.implementation.layout
    if not case.implementation.backward:
        raise Unsupported("forward only")
    native, dout = plain(w, case.device, 0).as_layout(layout), as_layout(gradients.upstream(w, case.device, 0), layout)
    kernel, _ = build(case, native)
    right = backward.gradients(case, kernel, native, dout, first=True)
    found = backward.gradients(case, kernel, native, transposed_in_memory(dout))
    if off := _off(right, found):
        return f"wrong: {off} where dout is a view of another layout"
    return "ok"


def beside_another(case: Case) -> str:
    """The reply to two kernels of the same sizes at once: each must keep the options that it was built with.

    A plan or a compiled kernel that is kept by the sizes alone takes those of the other.
    """
    asked = False
    for special, usual in PAIRS:
        try:
            complaint = _confused(replace(case, workload=special), replace(case, workload=usual))
        except Unsupported:
            continue
        asked = True
        if complaint:
            return f"wrong: {complaint}"
    if not asked:
        raise Unsupported("none of the options")
    return "ok"


def _confused(special: Case, usual: Case) -> str:
    """What is wrong of two cases beside one another though it was right of the first alone, "" if nothing.

    Raises Unsupported for either.
    """
    w, layout, pair = special.workload, special.implementation.layout, (special, usual)
    x, dout = plain(w, special.device, 0), gradients.upstream(w, special.device, 0)
    native, native_dout = x.as_layout(layout), as_layout(dout, layout)
    right = {case: attend(case.workload, x, None, torch.float64) for case in pair}
    kernels: list[Kernel] = []

    def complaint(case: Case) -> str:
        out = call(case, kernels[pair.index(case)], native)
        return _off([right[case]], [out.transpose(1, 2) if layout == "bshd" else out], ["its output"])

    def trained(case: Case) -> Inputs | None:
        with contextlib.suppress(Unsupported):
            if case.implementation.backward:
                return backward.gradients(case, kernels[pair.index(case)], native, native_dout, first=True)
        return None

    kernels.append(build(special, native)[0])
    if complaint(special):
        return ""  # wrong alone, as another probe will tell
    first = trained(special)
    kernels.append(build(usual, native)[0])
    for case, other in ((usual, special), (special, usual)):
        if off := complaint(case):
            return f"{off} with {case.workload} beside {other.workload}"
    known = {case: [one.out for one in gradients.reference(case.workload, x, dout).values()] for case in pair}
    if first is None or _off(known[special], first) or trained(usual) is None:
        return ""
    found = backward.beside(pair, kernels, native, native_dout)
    for case, other, one in zip(pair, pair[::-1], found, strict=True):
        if off := _off(known[case], one):
            return f"{off} with {case.workload} where {other.workload} ran before its backward pass"
    return ""


def _off(right: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str] = ("dq", "dk", "dv")) -> str:
    """Which of some results is off and by how much, "" if none."""
    for name, one, other in zip(names, right, found, strict=True):
        off = float((one - other).abs().max() / one.abs().max())
        if not off <= 8 * torch.finfo(other.dtype).eps:  # atomics need not repeat; NaN is wrong
            return f"{name} is off by {off:.0%} of its largest value"
    return ""


def averages(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero queries see all visible keys alike; v is 1, 2, 3, … along the keys, so a row is the mean of what it sees."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    v += torch.arange(1.0, w.kv_len + 1)[:, None]
    rows = []
    for i in range(w.q_len):
        last = i + w.offset
        first = max(0, last - w.window + 1) if w.window else 0
        rows.append((first + last) / 2 + 1 if last >= 0 else 0.0)
    return q, k, v, torch.tensor(rows)[:, None].expand(w.shapes()["out"]).double()


def heads(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v is the number of its KV head, from 1, and 10 more for each batch."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    batch = 10.0 * torch.arange(w.batch)[:, None, None, None]
    v += batch + torch.arange(1.0, w.kv_heads + 1)[:, None, None]
    out = batch + torch.arange(1.0, w.kv_heads + 1).repeat_interleave(w.group)[:, None, None]
    return q, k, v, out.expand(w.shapes()["out"]).double()


def one_score(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One key has the product 24 with every query, the others 0; only its v is not 0 but 1: its weight is the answer."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    q[..., 0], k[:, :, 3, 0], v[:, :, 3] = 4.0, 6.0, 1.0
    score = 24.0 / math.sqrt(w.scale_dim)
    score = w.softcap * math.tanh(score / w.softcap) if w.softcap else score
    weight = math.exp(score) / (math.exp(score) + w.kv_len - 1)
    return q, k, v, torch.full(w.shapes()["out"], weight, dtype=torch.float64)


def copies(w: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query i picks key 5·i mod n; v tells batch, head, key and column apart."""
    q, k, v = (torch.zeros(w.shapes()[name], dtype=torch.float64) for name in "qkv")
    picked = torch.arange(w.q_len) * 5 % w.kv_len
    k[:, :, torch.arange(w.kv_len), torch.arange(w.kv_len)] = 20.0
    q[:, :, torch.arange(w.q_len), picked] = 20.0
    number = torch.arange(float(w.batch * w.heads * w.kv_len)).reshape(w.batch, w.heads, w.kv_len, 1)
    v += number + 64 * (torch.arange(w.v_head_dim) % 3)
    return q, k, v, v[:, :, picked].clone()


def _w(text: str) -> Workload:
    return Workload.parse(f"{text}-bf16")


# of sizes of their own, for which nothing has been built before
PAIRS = tuple(
    (_w(f"b1-h3-s{length}-d64{special}"), _w(f"b1-h3-s{length}-d64{usual}"))
    for length, special, usual in ((40, "-causal-win4", "-causal"), (44, "-causal", ""), (56, "-scale144", ""), (72, "-cap2", ""))
)
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
    Probe("options kept", PAIRS[0][0], beside_another, lambda _w: True, True),
    Probe("dout as a view", _w("b1-h3-s24-d64"), of_a_view, lambda _w: False, True),  # what is timed has a contiguous one
)


def probe(implementation: Implementation, device: str, hurry: bool = False) -> dict[str, str]:
    """The answer to each probe: "ok", "unsupported: why", "raised: what" or "wrong: by how much".

    hurry: after an answer that took longer than SLOW, most others are "not asked: why". Raises Broken and DeviceLost.
    """
    answers: dict[str, str] = {}
    slow = False
    for asked in PROBES:
        if hurry and slow and (implementation.compiles or not asked.in_a_hurry):
            answers[asked.name] = "not asked: slow to build"
            continue
        started = time.perf_counter()
        answers[asked.name] = answer(asked, implementation, device)
        slow = time.perf_counter() - started > SLOW
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
    """The first wrong answer (w: that matters to this workload), with the probe's name, or ""."""
    for asked in PROBES:
        text = answers.get(asked.name, "")
        if text.startswith("wrong") and (w is None or asked.concerns(w)):
            return f"fails the probe {asked.name!r} ({asked.workload}): {text.removeprefix('wrong: ')}"
    return ""
