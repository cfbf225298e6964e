"""Deliberately broken forward kernels: what the check is tested with. Each row stands for a bug of real kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..registry import Kernel
from ..workload import Workload
from . import steps
from .steps import TILE, Steps, right_cap, right_mask


@dataclass(frozen=True)
class Mutant:
    """A broken kernel: `build(w)` returns `kernel(q, k, v) -> out`, layout "bhsd".

    On float64 inputs it computes in float64, so that its difference to the oracle is its fault's alone. Rounding faults
    differ always; `shows` says on which workloads they exceed what the dtype excuses.
    """

    name: str
    bug: str
    build: Callable[[Workload], Kernel]
    shows: Callable[[Workload], bool] | None = None


def broken(**wrong: Any) -> Callable[[Workload], Kernel]:
    """A builder of attention with some steps replaced."""
    attend = replace(Steps(), **wrong)
    return lambda w: lambda q, k, v: attend(w, q, k, v)


# Masks


def without_tile(which: Callable[[int], int], size: int) -> Callable[[Workload], Kernel]:
    """One tile of keys never visited; `which` picks it among their number."""
    return but(lambda w, _i, j: j // size == which(math.ceil(w.kv_len / size)))


def also(*where: Any) -> Callable[[Workload], Kernel]:
    return broken(mask=steps.more_keys(*where))


def but(*where: Any) -> Callable[[Workload], Kernel]:
    return broken(mask=steps.fewer_keys(*where))


PLACES: dict[str, Callable[[int], int]] = {"first": lambda n: 0, "middle": lambda n: n // 2, "last": lambda n: n - 1}  # noqa: ARG005

DROPPED = [
    *(
        Mutant(f"{place} {size}-key tile dropped", "bounds of the loop over key tiles", without_tile(which, size))
        for size in (64, 128)
        for place, which in PLACES.items()
    ),
    Mutant("last partial tile dropped", "kv_len // 64 tiles", but(lambda w, _i, j: j >= w.kv_len // TILE * TILE)),
    Mutant("first key dropped", "a loop from 1", but(lambda _w, _i, j: j == 0)),
    Mutant("last key dropped", "j < kv_len - 1", but(lambda w, _i, j: j == w.kv_len - 1)),
    Mutant("last key of each tile dropped", "j < 63 in a tile", but(lambda _w, _i, j: j % TILE == TILE - 1)),
    Mutant("last 16 keys dropped", "one MMA step too few", but(lambda w, _i, j: j >= w.kv_len - 16)),
    Mutant("keys after eight equal splits dropped", "kv_len // 8 keys each", but(lambda w, _i, j: j >= w.kv_len // 8 * 8)),
    Mutant("one query misses a tile", "tile count of another row", but(lambda w, i, j: (i == w.kv_len - 1) & (j < TILE))),
]

MASKS = [
    Mutant("causal missing", "flag not passed on", also(lambda _w, _i, j: j >= 0)),
    Mutant("causal one key more", "j <= i + 1", also(lambda _w, i, j: j == i + 1)),
    Mutant("causal one key less", "j < i", but(lambda _w, i, j: j == i, "causal")),
    Mutant("causal top-left", "SDPA's is_causal", broken(mask=lambda w, i, j: right_mask(w, i - w.offset, j))),
    Mutant("causal by tiles only", "diagonal tile not masked", also(lambda _w, i, j: j // TILE <= i // TILE)),
    Mutant("diagonal tile skipped", "j // 64 < i // 64", but(lambda _w, i, j: j // TILE == i // TILE, "causal")),
    Mutant("offset one less", "kv_len - q_len - 1", broken(mask=lambda w, i, j: right_mask(w, i - int(w.offset != 0), j))),
    Mutant("window missing", "flag not passed on", also(lambda _w, i, j: j <= i, "window")),
    Mutant("window one key more", "j >= i - window", also(lambda w, i, j: j == i - w.window, "window")),
    Mutant("window one key less", "(window - 2, 0)", but(lambda w, i, j: j == i - w.window + 1, "window")),
    Mutant(
        "window by tiles only",
        "first tile of the window not masked",
        also(lambda w, i, j: (j // TILE >= (i - w.window + 1) // TILE) & (j <= i), "window"),
    ),
    Mutant("window without the offset", "query index for position", broken(mask=steps.without_offset)),
    Mutant("window rounded up to 16", "tiles of 16 keys", broken(mask=steps.coarse_window)),
    Mutant("causal missing for few queries", "taken for decoding", also(steps.few_queries)),
    Mutant("hidden scores 0", "mask multiplied, not filled", broken(hidden=0.0)),
    Mutant("hidden scores -100", "finite fill, not low enough", broken(hidden=-100.0)),
]


# Scores


def cap_unscaled(w: Workload, scores: Tensor, visible: Tensor) -> Tensor:
    return right_cap(w, scores / w.scale, visible) * w.scale if w.softcap else scores


def pade(x: Tensor) -> Tensor:
    """Near tanh for small x; grows like x / 9 for large."""
    return x * (27 + x**2) / (27 + 9 * x**2)


def tanh_by(tanh: Callable[[Tensor], Tensor]) -> Callable[[Workload], Kernel]:
    return broken(cap=lambda w, s, _m: tanh(s / w.softcap) * w.softcap if w.softcap else s)


def padded(w: Workload) -> float:
    return math.sqrt(w.head_dim / 2 ** math.ceil(math.log2(w.head_dim)))


def leaking_cap(w: Workload) -> Kernel:
    """tanh(-inf) is -1: hidden keys get the score -softcap."""
    attend = Steps(hidden=-w.softcap if w.softcap else -math.inf)
    return lambda q, k, v: attend(w, q, k, v)


def many_rows(w: Workload) -> bool:
    """Enough of them for their mean to show what none can."""
    return w.batch * w.heads * w.q_len >= 256


SCORES = [
    Mutant("scale × 1.02", "a constant", broken(factor=lambda _w: 1.02)),
    Mutant("scale × 0.98", "a constant", broken(factor=lambda _w: 0.98)),
    Mutant("scale × 1.005", "a constant", broken(factor=lambda _w: 1.005), many_rows),
    Mutant("scale 1/d", "no square root", broken(factor=lambda w: w.head_dim**-0.5)),
    Mutant("scale 1", "not passed on", broken(factor=lambda w: 1 / w.scale)),
    Mutant("scale from head_dim", "the default wins", broken(factor=lambda w: math.sqrt(w.scale_dim / w.head_dim))),
    Mutant("scale of the padded head_dim", "head_dim rounded up", broken(factor=padded)),
    Mutant("exp2 without log2(e)", "the factor forgotten", broken(factor=lambda _w: math.log(2))),
    Mutant("last head_dim element ignored", "d < head_dim - 1", broken(inputs=lambda _w, q, k, v: (zero_last(q, 1), k, v))),
    Mutant("last 8 head_dim elements ignored", "head_dim // 16", broken(inputs=lambda _w, q, k, v: (zero_last(q, 8), k, v))),
    Mutant("softcap missing", "not passed on", broken(cap=lambda _w, s, _m: s)),
    Mutant("softcap doubled", "a constant", broken(cap=lambda w, s, m: right_cap(w.replace(softcap=2 * w.softcap), s, m))),
    Mutant("softcap before the scale", "order of the two", broken(cap=cap_unscaled)),
    Mutant("softcap's tanh by a fraction", "a Padé approximant, good to 2 or 3", tanh_by(pade)),
    Mutant("softcap's tanh flat past 2", "a table that ends", tanh_by(lambda x: torch.tanh(x.clamp(-2, 2)))),
    Mutant("softcap's tanh by exp(2x)", "inf / inf past 44", tanh_by(lambda x: (steps.exp(2 * x) - 1) / (steps.exp(2 * x) + 1))),
    Mutant("softcap after the mask", "tanh(-inf) = -1: hidden keys leak", leaking_cap, lambda w: w.offset <= 0),
]


def zero_last(x: Tensor, n: int) -> Tensor:
    return torch.cat([x[..., :-n], torch.zeros_like(x[..., -n:])], -1)


# Softmax


def several_tiles(w: Workload) -> bool:
    return min(w.kv_len, w.window or w.kv_len) > 2.5 * TILE and not w.softcap


SOFTMAX = [
    Mutant("no max-subtraction", "exp overflows", broken(weights=steps.unshifted)),
    *(
        Mutant(f"scores clamped at {most}", "instead of max-subtraction", broken(weights=steps.clamped(most)))
        for most in (60, 160)
    ),
    Mutant("running max starts at 0", "exp underflows", broken(weights=steps.peak_from_zero)),
    Mutant("padding in the maximum", "last tile's zero-filled keys", broken(weights=steps.peak_of_padding)),
    Mutant("max of half of each tile", "a warp reduction too short", broken(weights=steps.peak_of_half_tiles)),
    Mutant("one max for 64 queries", "reduced over the wrong axis", broken(weights=steps.peak_of_query_tile)),
    Mutant("neighbour's max past a tile boundary", "row index off by one", broken(weights=steps.neighbours_peak)),
    Mutant("accumulator not rescaled", "online softmax", broken(weights=steps.accumulator_not_rescaled)),
    Mutant("denominator not rescaled", "online softmax", broken(weights=steps.total_not_rescaled)),
    Mutant("light key tiles skipped", "below 2⁻⁸ of the running max", broken(weights=steps.light_tiles_skipped), several_tiles),
    Mutant("padding in the denominator", "last tile's zero-filled keys", broken(weights=steps.padding_counted)),
    Mutant("denominator missing", "lse never applied", broken(weights=steps.unnormalised)),
    Mutant("key tile visited twice", "loop increment", broken(weights=steps.tile_twice)),
    Mutant("splits averaged", "split-KV merged without lse", broken(weights=steps.splits_averaged)),
    Mutant("last split lost", "split-KV, one of eight not added", broken(weights=steps.last_split_lost)),
    Mutant("dropout left on", "training mode, p = 0.02", broken(weights=steps.dropout)),
]


# Indices


def stale_tile(x: Tensor) -> Tensor:
    """The second tile still holds the first one's rows."""
    width = min(TILE, max(0, x.shape[2] - TILE))
    return torch.cat([x[:, :, :TILE], x[:, :, :width], x[:, :, TILE + width :]], 2)


def swap(x: Tensor, axis: int) -> Tensor:
    order = [1, 0, *range(2, x.shape[axis])][: max(2, x.shape[axis])]
    return x.index_select(axis, torch.tensor(order, device=x.device)) if x.shape[axis] > 1 else x


def first_of_batch(_w: Workload, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


INDICES = [
    Mutant("GQA map h % kv", "interleaved heads", broken(kv_head=lambda w, h: h % w.kv_heads)),
    Mutant("GQA map of a neighbour", "off by one", broken(kv_head=lambda w, h: min(h // w.group + 1, w.kv_heads - 1))),
    Mutant("GQA map by a shift", "groups of a power of two", broken(kv_head=lambda w, h: h >> (w.group - 1).bit_length())),
    Mutant("one KV head for all", "KV head stride 0", broken(kv_head=lambda _w, _h: 0)),
    Mutant("two heads swapped", "head index", broken(after=lambda _w, out: swap(out, 1))),
    Mutant("two queries swapped", "row index", broken(after=lambda _w, out: swap(out, 2))),
    Mutant("two output columns swapped", "register layout", broken(after=lambda _w, out: swap(out, 3))),
    Mutant("batch index mixed", "output's batch stride", broken(after=lambda _w, out: out.roll(1, 0))),
    Mutant("batch 0's keys for all", "KV batch stride 0", broken(inputs=first_of_batch)),
    Mutant("K tile stale", "missing wait for a copy", broken(inputs=lambda _w, q, k, v: (q, stale_tile(k), v))),
    Mutant("V tile stale", "missing wait for a copy", broken(inputs=lambda _w, q, k, v: (q, k, stale_tile(v)))),
    Mutant("V shifted by a row", "pointer off by one", broken(inputs=lambda _w, q, k, v: (q, k, v.roll(1, 2)))),
    Mutant("two V rows swapped", "transposed load", broken(inputs=lambda _w, q, k, v: (q, k, swap(v, 2)))),
]


# Outputs


def rows_lost(first: Callable[[Workload], int]) -> Callable[[Workload], Kernel]:
    """Rows from `first` on never written: the memory holds what it held."""

    def after(w: Workload, out: Tensor) -> Tensor:
        lost = torch.arange(w.q_len, device=out.device)[:, None] >= first(w)
        return torch.where(lost, 0.0, out)

    return broken(after=after)


def one_value(change: Callable[[Tensor], Tensor | float]) -> Callable[[Workload], Kernel]:
    """The first element of the last row changed, by what `change` makes of the row."""

    def after(_w: Workload, out: Tensor) -> Tensor:
        out = out.clone()
        out[-1, -1, -1, 0] = change(out[-1, -1, -1])
        return out

    return broken(after=after)


def remembering(which: int) -> Callable[[Workload], Kernel]:
    """Returns the output of an earlier call: -2 the previous one, 0 the first."""

    def build(w: Workload) -> Kernel:
        outs: list[Tensor] = []

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs.append(Steps()(w, q, k, v))
            return outs[max(which, -len(outs))]

        return kernel

    return build


OUTPUTS = [
    Mutant("last partial query tile unwritten", "q_len // 64 tiles", rows_lost(lambda w: w.q_len // TILE * TILE)),
    Mutant("last query unwritten", "i < q_len - 1", rows_lost(lambda w: w.q_len - 1)),
    Mutant("previous call's output", "a buffer returned too early", remembering(-2)),
    Mutant("first call's output", "a graph captured once", remembering(0)),
    Mutant("one NaN", "0 / 0 in a row", one_value(lambda _row: math.nan)),
    Mutant("one infinity", "overflow in a row", one_value(lambda _row: -math.inf)),
    Mutant("one value's sign", "register clobbered", one_value(lambda row: -row[0] - row.abs().mean() / 8)),
    Mutant("output × 0.995", "1 / (1 - p) without dropout, a wrong log2(e)", broken(after=lambda _w, out: 0.995 * out)),
    Mutant("zeros", "nothing launched", broken(after=lambda _w, out: torch.zeros_like(out))),
    Mutant("mean of V", "scores never computed", broken(inputs=lambda _w, q, k, v: (torch.zeros_like(q), k, v))),
]


# Rounding: worse than the workload's dtype, undeclared


def through(cast: Callable[[Tensor], Tensor], names: str = "qkv") -> Callable[[Workload], Kernel]:
    return broken(inputs=lambda _w, *x: tuple(cast(t) if n in names else t for n, t in zip("qkv", x, strict=True)))


def bf16(x: Tensor) -> Tensor:
    return steps.rounded(x, torch.bfloat16)


def fp16(x: Tensor) -> Tensor:
    return steps.rounded(x, torch.float16)


def products_half(w: Workload, scores: Tensor, visible: Tensor) -> Tensor:
    return right_cap(w, fp16(scores / w.scale) * w.scale, visible)


def wide(w: Workload) -> bool:
    """The dtype has room for what float16 has not."""
    return w.dtype != torch.float16


def wide_and_uncapped(w: Workload) -> bool:
    return wide(w) and not w.softcap  # whose tanh takes an infinity


def sums_low(w: Workload) -> bool:
    return w.kv_len >= 128 and w.window == 0 and w.dtype != torch.float32


ROUNDING = [
    Mutant("sum over keys in the dtype", "16-bit accumulator", broken(product=steps.summed_low), sums_low),
    Mutant("denominator in the dtype", "16-bit accumulator", broken(weights=steps.total_summed_low), sums_low),
    Mutant(
        "weights truncated",
        "bf16 by cutting bits off: every row comes out short",
        broken(product=lambda _w, p, v: steps.cut(p) @ v),
        lambda w: w.q_len > 16,  # rows enough for their mean to show it
    ),
    Mutant("inputs through TF32", "allow_tf32", through(steps.tf32), lambda w: w.dtype == torch.float32),
    Mutant("inputs through bf16", "a cast", through(bf16), lambda w: w.dtype != torch.bfloat16),
    Mutant("products through fp16", "no room for q·k before the scale", broken(cap=products_half), wide_and_uncapped),
    Mutant("V through fp16", "no room for its range", through(fp16, "v"), wide),
    Mutant("output through fp16", "no room for its range", broken(after=lambda _w, out: fp16(out)), wide),
    Mutant("K through fp8", "an undeclared quantisation", through(steps.quantised, "k"), lambda _w: True),
    Mutant("V through fp8", "an undeclared quantisation", through(steps.quantised, "v"), lambda _w: True),
    Mutant(
        "weights through fp8",
        "an undeclared quantisation",
        broken(product=lambda _w, p, v: steps.quantised(p) @ v),
        lambda _w: True,
    ),
]

MUTANTS = [*DROPPED, *MASKS, *SCORES, *SOFTMAX, *INDICES, *OUTPUTS, *ROUNDING]
