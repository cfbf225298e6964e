"""The tensors of a workload: seeded randn for timing, randn with needles for correctness."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..workload import Workload


class Inputs(NamedTuple):
    """q [B, H, Sq, D], k [B, KV, Skv, D], v [B, KV, Skv, DV], contiguous, in the workload's dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def as_layout(self, layout: str) -> Inputs:
        """A copy of the same values, contiguous in a layout."""
        if layout == "bhsd":
            return Inputs(*(tensor.clone() for tensor in self))
        return Inputs(*(tensor.transpose(1, 2).contiguous() for tensor in self))


def plain(w: Workload, device: str, seed: int) -> Inputs:
    """Standard normal q, k, v, the same for a seed on a type of device. What benchmarks are timed on."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = w.shapes()
    return Inputs(*(torch.randn(shapes[n], generator=generator, device=device).to(w.dtype) for n in "qkv"))


def needles(w: Workload, device: str, seed: int) -> Inputs:
    """`plain`, with some queries pointed at one key each, so that a misplaced mask, tile or head changes whole rows.

    Of the queries of each head, about a quarter point at a random visible key, each 64-key tile getting its share,
    half of them saturated (the key takes nearly all weight) and half not (it takes about half: a wrong scale shows);
    and up to an eighth point at the edges of the mask: the last key seen, the first one hidden, and likewise at the
    far end of a window.
    """
    q, k, v = plain(w, device, seed)
    spots = _spots(w, torch.Generator().manual_seed(seed))
    batch, head, row, key, saturated = (spots[:, n].to(device) for n in range(5))
    keys = k[batch, head // w.group, key].float()  # [N, D]
    # a query t·key/|key| / scale / |key| gives its key the logit t and the others a spread of t/|key|
    norm = keys.norm(dim=-1, keepdim=True)
    spread = (14.0 / norm) ** 2 / 2
    half = math.log(max(2, w.seen_keys)) + spread
    target = torch.where(saturated[:, None] == 1, half + 9.0, half)
    if w.softcap:
        target = target.clamp(max=0.95 * w.softcap)
        target = w.softcap * torch.atanh(target / w.softcap)
    # a tiny head dim makes tiny keys: their needles must not overflow
    q[batch, head, row] = (keys * target / (w.scale * norm**2)).clamp(-1000, 1000).to(w.dtype)
    return Inputs(q, k, v)


def _spots(w: Workload, generator: torch.Generator) -> torch.Tensor:
    """Where the needles are: rows (batch, query head, query, key, saturated) of an int64 tensor [N, 5]."""

    def randint(high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    heads = w.batch * w.heads
    tiles = math.ceil(w.kv_len / 64)
    per_head = max(1, min(w.q_len // 4, 2 * tiles))
    n = heads * per_head
    index = torch.arange(n)
    which = index // per_head  # flat (batch, head)
    tile = index % tiles  # goes on from head to head, so that short queries still cover every tile
    key = torch.minimum(tile * 64 + randint(64, n), torch.tensor(w.kv_len - 1))
    if w.causal:
        first = (key - w.offset).clamp(min=0)
        last = torch.full_like(key, w.q_len - 1)
        if w.window:
            last = torch.minimum(last, key - w.offset + w.window - 1)
        seen = last >= first
        row = first + (torch.rand(n, generator=generator) * (last - first + 1).clamp(min=1)).long()
    else:
        seen = torch.ones(n, dtype=torch.bool)
        row = randint(w.q_len, n)
    spots = [torch.stack([which, row, key, (index // tiles + which) % 2], 1)[seen]]
    if w.causal:
        edges = torch.tensor([0, 1] + ([-w.window, 1 - w.window] if w.window else []))
        m = max(len(edges), heads * w.q_len // 8)
        which, row, edge = randint(heads, m), randint(w.q_len, m), edges[torch.arange(m) % len(edges)]
        key = row + w.offset + edge
        inside = (key >= 0) & (key < w.kv_len)
        spots.append(torch.stack([which, row, key, torch.ones_like(key)], 1)[inside])
    flat = torch.cat(spots)
    # one needle a query: of several, keep the last (the mask's edges)
    query = flat[:, 0] * w.q_len + flat[:, 1]
    last_of = {int(position): n for n, position in enumerate(query.tolist())}
    flat = flat[torch.tensor(sorted(last_of.values()), dtype=torch.long)]
    return torch.cat([flat[:, :1] // w.heads, flat[:, :1] % w.heads, flat[:, 1:]], 1)
