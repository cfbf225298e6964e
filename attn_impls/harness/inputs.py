"""The tensors of a workload: seeded randn for timing, randn with needles for correctness."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..registry import in_layout
from ..workload import Workload


class Inputs(NamedTuple):
    """q [B, H, Sq, D], k [B, KV, Skv, D], v [B, KV, Skv, DV], contiguous, in the workload's dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def as_layout(self, layout: str) -> Inputs:
        """A copy of the same values, contiguous in a layout."""
        return Inputs(*(as_layout(tensor, layout) for tensor in self))


def as_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of a "bhsd" tensor's values, contiguous in a layout: what a kernel does to it must not change the original."""
    native = in_layout(tensor, layout)
    # with one head or one row, a transpose moves nothing either
    return native.clone(memory_format=torch.contiguous_format) if native.data_ptr() == tensor.data_ptr() else native


def transposed_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the same shape, a view of what is contiguous in the other layout."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def plain(w: Workload, device: str, seed: int) -> Inputs:
    """Standard normal q, k, v, the same for a seed on a type of device. What benchmarks are timed on."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = w.shapes()
    return Inputs(*(torch.randn(shapes[n], generator=generator, device=device).to(w.dtype) for n in "qkv"))


# Powers of two, so that they cost no bit: what goes through float16 on its way overflows in V, and in dout it is lost.
LOUD, FAINT = 2.0**20, 2.0**-44


def loudness(w: Workload) -> float:
    """What the needles' V is multiplied by, where the dtype has room for it."""
    return 1.0 if w.dtype == torch.float16 else LOUD


# what a needle does to the scores of its query
HALF, SATURATED, TOWERING, SUNKEN, HUGE, CAPPED, BEYOND, FAR_BEYOND = range(8)
TOWER, PARTNER, SINK = 192.0, 180.0, -120.0  # scores whose exp overflows, or underflows, in float32 (88.7, -103.9)
RAW = 80000.0  # a product of q and k past float16's range
OUTSIDE, FAR_OUTSIDE = 8.0, 48.0  # times the softcap: where tanh is 1, and where a float32 exp of twice that overflows
# scores that are all low, but for one 30 above them; what their keys have in common, over a usual key's length
DROWNED, AFLOAT, COMMON = -130.0, 30.0, 3.5
DROWNING = 1 / 24  # of the queries of those heads


def needles(w: Workload, device: str, seed: int, quiet: bool = False) -> Inputs:
    """`pointed`, and in every third KV head some queries whose scores are all far below 0, where an exp without the right
    maximum underflows.

    quiet: without these and all else that is extreme, for kernels that share a scale among the rows of a block.
    """
    inputs = pointed(w, device, seed, quiet)
    if quiet or w.softcap or w.head_dim < 32:  # a capped score is not that low, and those of a small head dim spread too far
        return inputs
    return _drowned(w, inputs, seed)


def _drowned(w: Workload, x: Inputs, seed: int) -> Inputs:
    """Keys of some heads that have a direction in common, which a few queries point away from and the others do not see.

    Each of the few points at one key, too, which has nearly all weight where the head dim is not small: no rounding counts.
    """
    device, generator = x.q.device, torch.Generator().manual_seed(seed + 5)
    deep = torch.arange(w.batch * w.kv_heads).reshape(w.batch, w.kv_heads) % 3 == 0
    along = torch.ones(w.head_dim, device=device) / w.head_dim**0.5
    along[1::2] *= -1
    common = COMMON * w.head_dim**0.5
    where = deep.to(device)[:, :, None, None]
    k = torch.where(where, x.k.float() + common * along, x.k.float())
    q = x.q.float()
    q = torch.where(where.repeat_interleave(w.group, 1), q - (q @ along)[..., None] * along, q)
    few = torch.rand(w.batch, w.heads, w.q_len, generator=generator) < DROWNING
    few[0, [0, w.group - 1], -1] = True
    ordinary = (x.q.float().norm(dim=-1) < 8 * w.head_dim**0.5).cpu()  # no tower
    batch, head, row = (few & ordinary & deep.repeat_interleave(w.group, 1)[:, :, None]).nonzero().unbind(1)
    first, last = _seen(w, row)
    key = first + (torch.rand(len(row), generator=generator) * (last - first + 1)).long()
    batch, head, row, key = (index[last >= first].to(device) for index in (batch, head, row, key))
    one = x.k[batch, head // w.group, key].float()
    one = one - (one @ along)[:, None] * along
    afloat = AFLOAT * one / one.square().sum(-1, keepdim=True)
    q[batch, head, row] = (DROWNED / common * along + afloat) / w.scale
    return x._replace(q=q.to(w.dtype), k=k.to(w.dtype))


def pointed(w: Workload, device: str, seed: int, quiet: bool = False, huge: bool = True) -> Inputs:
    """`plain`, with some queries pointed at one key each, so that a misplaced mask, tile or head changes whole rows.

    Of the queries of each head, about a quarter point at a random visible key, each 64-key tile getting its share,
    half of them saturated (the key takes nearly all weight) and half not (it takes about half: a wrong scale shows; or up to
    20 times the others' weight, so that they still count, which nothing may skip as too light);
    up to an eighth point at the edges of the mask: the last key seen, the first one hidden, and likewise at the
    far end of a window. A few tower: two neighbouring keys score 192 and 180, which only a softmax that subtracts the
    right maximum survives. With a softcap, the two score 0.9 of it and 1.5 less instead: uncapped they are far apart. Or the
    first is far beyond the cap before it is capped, where a tanh made by hand fails.
    And a query that sees one key alone scores it -120, so that nothing hidden may leak. V is loud. quiet: it is not, and
    nothing is beyond the cap. huge, and not quiet: some products are past float16's range.
    """
    q, k, v = plain(w, device, seed)
    spots = _spots(w, torch.Generator().manual_seed(seed))
    batch, head, row, key, kind, partner = spots.to(device).unbind(1)
    kind = kind.clamp(max=CAPPED) if quiet else kind
    kind = kind if huge and not quiet else torch.where(kind == HUGE, SATURATED, kind)
    pair = torch.stack([k[batch, head // w.group, n] for n in (key, partner)], 1).float()  # [N, 2, D]
    # a query t·key/|key| / scale / |key| gives its key the logit t and the others a spread of t/|key|
    norm = pair[:, 0].norm(dim=-1)
    half = math.log(max(2, w.seen_keys)) + (14.0 / norm) ** 2 / 2
    half = half + torch.arange(len(half), device=device) // 2 % 4
    tall, low, same = 0.9 * w.softcap, 0.9 * w.softcap - 1.5, torch.ones_like(half)
    far = FAR_OUTSIDE * w.softcap
    wanted = torch.stack([half, half + 9.0, TOWER * same, SINK * same, RAW * w.scale * same, *[tall * same] * 3], 1)  # [N, kinds]
    target = torch.stack([wanted.gather(1, kind[:, None])[:, 0], torch.where(kind >= CAPPED, low, PARTNER)], 1)
    if w.softcap:
        target = target.clamp(min=-0.95 * w.softcap, max=0.95 * w.softcap)
        target = w.softcap * torch.atanh(target / w.softcap)
        target[kind == BEYOND, 0] = OUTSIDE * w.softcap
        target[kind == FAR_BEYOND, 0] = max(far, RAW * w.scale) if huge and w.dtype != torch.float16 else far
    alone = (kind < TOWERING) | (kind == SUNKEN) | (kind == HUGE) | (kind == FAR_BEYOND) | (partner == key)
    query = _solve(pair, target / w.scale, alone)
    # a tiny head dim makes tiny keys: their needles must not overflow
    most = 1000.0 if w.dtype == torch.float16 else 1e5
    q[batch, head, row] = query.clamp(-most, most).to(w.dtype)
    return Inputs(q, k, v if quiet else v * loudness(w))


def needle_rows(w: Workload, seed: int) -> torch.Tensor:
    """Query rows that carry needles, each once, in an order whose every beginning has as many tiles and kinds as it can."""
    spots = _spots(w, torch.Generator().manual_seed(seed))
    row, key, kind = spots[:, 2], spots[:, 3], spots[:, 4]
    seen: dict[tuple[int, int], int] = {}
    ranks = []
    for group in zip((key // 64).tolist(), kind.tolist(), strict=True):
        seen[group] = rank = seen.get(group, -1) + 1
        ranks.append(rank)
    order = torch.tensor(ranks, dtype=torch.long).argsort(stable=True)
    return torch.tensor(list(dict.fromkeys(row[order].tolist())), dtype=torch.long)


def _solve(pair: torch.Tensor, target: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """The query [N, D] in the plane of two keys [N, 2, D] with two given products; only the first counts where `alone`."""
    a, b = pair.unbind(1)
    aa, bb, ab = a.square().sum(-1), b.square().sum(-1), torch.where(alone, 0.0, (a * b).sum(-1))
    s, t = target.unbind(1)
    t = torch.where(alone, 0.0, t)
    bb = torch.where(alone, 1.0, bb)
    det = aa * bb - ab**2
    return ((s * bb - t * ab) / det)[:, None] * a + ((t * aa - s * ab) / det)[:, None] * b


def _spots(w: Workload, generator: torch.Generator) -> torch.Tensor:
    """Where the needles are: rows (batch, query head, query, key, kind, partner key) of an int64 tensor [N, 6]."""
    flat = torch.cat([_spread(w, generator), _edges(w, generator), _towers(w, generator), _sunken(w), _last_key(w)])
    # one needle a query: of several, keep the last
    query = flat[:, 0] * w.q_len + flat[:, 1]
    last_of = {int(position): n for n, position in enumerate(query.tolist())}
    flat = flat[torch.tensor(sorted(last_of.values()), dtype=torch.long)]
    # a tower's partner is the key before, or after, or none
    key, (first, last) = flat[:, 2], _seen(w, flat[:, 1])
    partner = torch.where(key - 1 >= first, key - 1, torch.where(key + 1 <= last, key + 1, key))
    return torch.cat([flat[:, :1] // w.heads, flat[:, :1] % w.heads, flat[:, 1:], partner[:, None]], 1)


def _seen(w: Workload, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last key that each query sees; first > last where it sees none."""
    own = row + w.offset
    last = own if w.causal else torch.full_like(own, w.kv_len - 1)
    first = (own - w.window + 1).clamp(min=0) if w.window else torch.zeros_like(own)
    return first, last


def _spread(w: Workload, generator: torch.Generator) -> torch.Tensor:
    """Needles (flat batch · heads + head, query, key, kind) at random visible keys, each tile getting its share."""
    heads = w.batch * w.heads
    tiles = math.ceil(w.kv_len / 64)
    per_head = max(1, min(w.q_len // 4, 4 * tiles))
    n = heads * per_head
    index = torch.arange(n)
    which = index // per_head  # flat (batch, head)
    tile = index % tiles  # goes on from head to head, so that short queries still cover every tile
    key = torch.minimum(tile * 64 + torch.randint(64, (n,), generator=generator), torch.tensor(w.kv_len - 1))
    if w.causal:
        first = (key - w.offset).clamp(min=0)
        last = torch.full_like(key, w.q_len - 1)
        if w.window:
            last = torch.minimum(last, key - w.offset + w.window - 1)
        seen = last >= first
        row = first + (torch.rand(n, generator=generator) * (last - first + 1).clamp(min=1)).long()
    else:
        seen = torch.ones(n, dtype=torch.bool)
        row = torch.randint(w.q_len, (n,), generator=generator)
    return torch.stack([which, row, key, (index // tiles + which) % 2], 1)[seen]


def _edges(w: Workload, generator: torch.Generator) -> torch.Tensor:
    """Needles on both sides of the mask's edges."""
    heads = w.batch * w.heads
    edges = torch.tensor(([0, 1] if w.causal else []) + ([-w.window, 1 - w.window] if w.window else []), dtype=torch.long)
    m = max(len(edges), heads * w.q_len // 8) if w.causal else 0
    which, row = (torch.randint(high, (m,), generator=generator) for high in (heads, w.q_len))
    key = row + w.offset + edges[torch.arange(m) % max(1, len(edges))]
    inside = (key >= 0) & (key < w.kv_len)
    return torch.stack([which, row, key, torch.full_like(key, SATURATED)], 1)[inside]


def _towers(w: Workload, generator: torch.Generator) -> torch.Tensor:
    """A few needles at two visible keys each, towering or at and beyond the cap, where no small head dim blurs them."""
    queries = w.batch * w.heads * w.q_len
    n = min(max(3, queries // 48), (queries + 1) // 2) if w.head_dim >= 40 else 0
    query = torch.randperm(queries, generator=generator)[:n]
    which, row = query // w.q_len, query % w.q_len
    first, last = _seen(w, row)
    key = first + (torch.rand(len(row), generator=generator) * (last - first + 1).clamp(min=1)).long()
    found = torch.stack([which, row, key, torch.full_like(key, TOWERING)], 1)[last >= first]
    if w.softcap:
        found[:, 3] = CAPPED + torch.arange(len(found)) % 3
    elif w.dtype != torch.float16:
        found[1::3, 3] = HUGE
    return found


def _last_key(w: Workload) -> torch.Tensor:
    """Where heads have one query each, the last one's points at the last key, whatever else it did: few others may."""
    heads = w.batch * w.heads
    return torch.tensor([[heads - 1, 0, w.kv_len - 1, SATURATED]] if w.q_len == 1 < heads else []).reshape(-1, 4).long()


def _sunken(w: Workload) -> torch.Tensor:
    """In every other head, the query that sees key 0 alone."""
    row = -w.offset if w.causal and w.offset <= 0 and -w.offset < w.q_len else None
    which = torch.arange(0, w.batch * w.heads if row is not None else 0, 2)
    return torch.stack([which, torch.full_like(which, row or 0), torch.zeros_like(which), torch.full_like(which, SUNKEN)], 1)
