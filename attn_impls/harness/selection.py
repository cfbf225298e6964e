"""What a run covers: the options resolved to workloads, implementations and a device. Every usage error is found here."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
import torch

from ..parallel import STRATEGIES, Form
from ..presets import COMBINATIONS, CPU_RULE, DEFAULT_PRESETS, PRESETS, cpu_sized, preset
from ..rare import RARE
from ..registry import REGISTRY, Implementation, discover, load_file
from ..workload import DIRECTIONS, DTYPES, Workload
from . import settings
from .environment import device_bytes

# option: the field of Workload it overrides
FIELDS = {"batch_size": "batch", "seq_len": "q_len", "kv_len": "kv_len", "num_kv_heads": "kv_heads"}
NUMBERS = ("batch_size", "seq_len", "kv_len", "embed_dim", "num_heads", "num_kv_heads", "head_dim")
MASKS = ("full", "causal")
SHOWN = 12  # names in an error
DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class Selection:
    device: str
    workloads: tuple[Workload, ...]
    implementations: tuple[Implementation, ...]
    labels: dict[Workload, str] = field(default_factory=dict)  # the preset's name, for workloads that are one
    required: frozenset[str] = frozenset()
    rounds: int | None = None
    warmup_rounds: int | None = None
    seed: int = 0
    directions: tuple[str, ...] = ("forward",)  # to be timed
    checked: tuple[str, ...] = DIRECTIONS  # to be checked
    case_timeout: float = 300.0
    forms: dict[str, tuple[Form, ...]] = field(default_factory=dict)  # of each distributed strategy
    overlap_chunks: tuple[int, ...] = (1,)
    overlap_along: str = "auto"
    overlap_streams: tuple[int, ...] = (2, 2)
    pad_heads: bool = False
    cpu_rule: str = ""  # how presets were scaled, where they were
    also_checked: tuple[Workload, ...] = ()  # by the correctness tests, beside `workloads`
    rare: tuple[Workload, ...] = ()  # by those marked so, which leave out what compiles anew for each


def resolve(options: dict[str, Any]) -> Selection:
    """The selection that the options ask for. Raises pytest.UsageError with one line."""
    try:
        device = _device(options["device"])
        implementations = _implementations(options["impl"], options["require_impl"])
        labels, scaled = _workloads(options, device)
        also_checked, rare = ([], []) if _chosen(options) else (list(map(preset, COMBINATIONS)), list(map(Workload.parse, RARE)))
        forms = _forms(options["form"])
        directions = _directions(options["direction"])
        for w in (*labels, *also_checked, *rare):
            _must_fit(w, device)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    return Selection(
        device,
        tuple(labels),
        tuple(implementations),
        {w: label for w, label in labels.items() if label},
        frozenset(options["require_impl"]),
        options["rounds"],
        options["warmup_rounds"],
        options["seed"],
        directions or ("forward",),
        directions or DIRECTIONS,
        options["case_timeout"],
        forms,
        options["overlap_chunks"],
        options["overlap_along"],
        options["overlap_streams"],
        options["pad_heads"],
        CPU_RULE if scaled else "",
        tuple(also_checked),
        tuple(rare),
    )


def _forms(chosen: list[str]) -> dict[str, tuple[Form, ...]]:
    """The chosen forms of each distributed strategy."""
    known = {form.name for forms in STRATEGIES.values() for form in forms}
    for word in chosen:
        if word not in known:
            raise ValueError(f"--form {word!r}: no such form; {nearest(word, known)}")
    return {name: tuple(form for form in forms if not chosen or form.name in chosen) for name, forms in STRATEGIES.items()}


def _directions(chosen: list[str]) -> tuple[str, ...]:
    for word in chosen:
        if word not in DIRECTIONS:
            raise ValueError(f"--direction {word!r}: give one of {', '.join(DIRECTIONS)}")
    return tuple(dict.fromkeys(chosen))


def _device(name: str) -> str:
    if name not in DEVICES:
        raise ValueError(f"--device {name!r}: give one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; give --device cpu, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _implementations(chosen: list[str], required: list[str]) -> list[Implementation]:
    before = settings.current()
    discover()
    if changed := settings.restore(before):
        warnings.warn(f"an installed package's implementations changed {changed} when imported; it is set back", stacklevel=2)
    selected: dict[str, Implementation] = {}
    for word in chosen:
        if word.endswith(".py") or "/" in word:
            selected.update((i.name, i) for i in load_file(word))
            if changed := settings.restore(before):
                raise ValueError(f"--impl {word!r} changes {changed} for all when imported: set it, and set it back, in a call")
        else:
            selected[word] = _known(word, "--impl")
    if not chosen:
        selected = dict(REGISTRY)
    for word in required:
        selected[word] = _known(word, "--require-impl")
    return list(selected.values())


def _known(name: str, flag: str) -> Implementation:
    if name not in REGISTRY:
        raise ValueError(f"{flag} {name!r}: no such implementation; {nearest(name, REGISTRY)}")
    return REGISTRY[name]


def _chosen(options: dict[str, Any]) -> bool:
    """Whether the options say which workloads; if not, the default set is run."""
    return bool(options["workload"]) or list(_overrides(options)) != [{}]


def _workloads(options: dict[str, Any], device: str) -> tuple[dict[Workload, str], bool]:
    """The workloads in order, each with its preset's name ("" for none), and whether presets were scaled for a CPU."""
    overrides = list(_overrides(options))
    names = options["workload"] or (["seed"] if _chosen(options) else list(DEFAULT_PRESETS))
    labels: dict[Workload, str] = {}
    scaled = False
    for name in names:
        for base, label in _named(name):
            if label and label not in COMBINATIONS and device == "cpu":
                base, label, scaled = cpu_sized(base), f"{label}, CPU-sized", True
            for override in overrides:
                w = _overridden(base, override)
                labels.setdefault(w, label if w == base else "")
    return labels, scaled


def _named(name: str) -> list[tuple[Workload, str]]:
    """The workloads of a preset's name, of a glob over the names, or of an id, each with its preset's name."""
    matches = fnmatch.filter(PRESETS, name)
    if matches:
        return [(preset(match), match) for match in matches]
    if name[:1] == "b" and name[1:2].isdigit():
        return [(Workload.parse(name), "")]
    raise ValueError(f"--workload {name!r}: no such preset, and not an id; {nearest(name, PRESETS)}")


def _overrides(options: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every combination of the overriding options' values."""
    given: dict[str, list[Any]] = {}
    for option in NUMBERS:
        if options[option]:
            given[option] = [_number(option, text) for text in options[option]]
    for option, allowed in (("dtype", tuple(DTYPES)), ("mask", MASKS)):
        for word in options[option]:
            if word not in allowed:
                raise ValueError(f"--{option} {word!r}: give {', '.join(allowed)}")
        if options[option]:
            given[option] = options[option]
    for values in itertools.product(*given.values()):
        yield dict(zip(given, values, strict=True))


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ValueError(f"--{option.replace('_', '-')} {text!r}: give whole numbers above 0, of at most 18 digits")
    return int(text)


def _overridden(w: Workload, override: dict[str, Any]) -> Workload:
    changes: dict[str, Any] = {FIELDS[option]: value for option, value in override.items() if option in FIELDS}
    changes |= _heads(w, override)
    if "dtype" in override:
        changes["dtype"] = DTYPES[override["dtype"]]
    if "mask" in override:
        changes["causal"] = override["mask"] == "causal"
        changes["window"] = w.window if changes["causal"] else 0
    return w.replace(**changes)


def _heads(w: Workload, override: dict[str, Any]) -> dict[str, int]:
    """Heads and head dim from --num-heads, --head-dim and --embed-dim, which is their product."""
    given = {name: override[option] for option, name in (("num_heads", "heads"), ("head_dim", "head_dim")) if option in override}
    embed = override.get("embed_dim")
    if embed is None:
        return given
    other, wanted = ("head_dim", "heads") if set(given) == {"head_dim"} else ("heads", "head_dim")
    divisor = given.get(other, getattr(w, other))
    if embed % divisor:
        raise ValueError(
            f"--embed-dim {embed} is not divisible by {other} {divisor}: give a multiple of {divisor}, or change {other}"
        )
    if given.get(wanted, embed // divisor) != embed // divisor:
        raise ValueError(f"--embed-dim {embed} is not {divisor} heads × head dim {given[wanted]}: leave one of the three out")
    return {other: divisor, wanted: embed // divisor}


def _must_fit(w: Workload, device: str) -> None:
    needed = sum(b * x * y * z for b, x, y, z in w.shapes().values()) * w.dtype.itemsize
    there = device_bytes(device)
    if needed > there:
        raise ValueError(
            f"workload {w} would not fit: q, k, v and the output need {Decimal(needed) / 2**30:,.1f} GiB, "
            f"and this {device} device has {there / 2**30:,.1f} GiB; give smaller sizes"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the known names closest to a wrong one, or some of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    more = ", … (python -m attn_impls list)" if len(known) > SHOWN else ""
    return f"give one of {', '.join(known[:SHOWN])}{more}"
