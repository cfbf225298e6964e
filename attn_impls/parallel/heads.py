"""Which heads each rank computes: Megatron's rule for grouped queries, padding, and chunks that gather in place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..registry import Unsupported
from ..workload import Workload

MAX_PADDING = 4  # padded heads are looked for up to this multiple of the real ones


@dataclass(frozen=True)
class Partition:
    """The heads of a workload dealt to `size` ranks, in chunks.

    A slot is a query head's place in the padded numbering; without padding, slots are the heads. Rank r computes the slots
    of `slots(r, c)` for each chunk c. Where `interleaved`, chunk c of all ranks together is one contiguous block of slots,
    so that gathering it needs no copy; otherwise each rank's slots are contiguous over all its chunks.
    """

    workload: Workload
    padded: Workload
    size: int
    chunks: tuple[int, ...]  # query heads of a rank in each chunk
    interleaved: bool

    @property
    def local_heads(self) -> int:
        return self.padded.heads // self.size

    @property
    def sharing(self) -> int:
        """Ranks that hold the same KV head: 1, unless there are fewer KV heads than ranks."""
        return max(1, self.size // self.padded.kv_heads)

    @property
    def bound(self) -> float:
        """The share of the ranks' work that is not padding: the highest efficiency there can be."""
        return self.workload.heads / self.padded.heads

    def slots(self, rank: int, chunk: int) -> range:
        before, count = sum(self.chunks[:chunk]), self.chunks[chunk]
        first = self.size * before + rank * count if self.interleaved else rank * self.local_heads + before
        return range(first, first + count)

    def query_heads(self, rank: int, chunk: int) -> list[int]:
        """The workload's query heads in a chunk of a rank's, -1 for padding."""
        return [self._head(slot) for slot in self.slots(rank, chunk)]

    def kv_heads(self, rank: int, chunk: int) -> list[int]:
        """The KV heads that those queries read, each once, -1 for padding."""
        found = dict.fromkeys(slot // self.padded.group for slot in self.slots(rank, chunk))
        return [kv if kv < self.workload.kv_heads else -1 for kv in found]

    def all_query_heads(self, rank: int) -> list[int]:
        return [head for chunk in range(len(self.chunks)) for head in self.query_heads(rank, chunk)]

    def all_kv_heads(self, rank: int) -> list[int]:
        """A rank's KV heads over all its chunks; a head that several chunks read stands once."""
        return list(dict.fromkeys(kv for chunk in range(len(self.chunks)) for kv in self.kv_heads(rank, chunk)))

    def local(self, chunk: int) -> Workload:
        """What a rank computes in a chunk."""
        return self.padded.replace(heads=self.chunks[chunk], kv_heads=len(self.kv_heads(0, chunk)))

    @cached_property
    def real_slots(self) -> list[int] | None:
        """The slots that hold a head, in the heads' order; None without padding."""
        if self.padded == self.workload:
            return None
        return [slot for slot in range(self.padded.heads) if self._head(slot) >= 0]

    def _head(self, slot: int) -> int:
        kv, member = divmod(slot, self.padded.group)
        inside = kv < self.workload.kv_heads and member < self.workload.group
        return kv * self.workload.group + member if inside else -1


def partition(w: Workload, size: int, weights: tuple[int, ...] = (1,), pad: bool = False) -> Partition:
    """Deal the heads of `w` to `size` ranks, each rank's in chunks of about these weights.

    Raises Unsupported, naming what would do, where the heads cannot be dealt evenly and `pad` is False.
    """
    reason = indivisible(w.heads, w.kv_heads, size)
    if reason and not pad:
        raise Unsupported(f"{reason}; --pad-heads computes {_padded(w, size).heads} heads instead of {w.heads}")
    padded = _padded(w, size) if reason else w
    local = padded.heads // size
    whole_kv = padded.kv_heads % size == 0
    unit = padded.group if whole_kv else 1
    chunks = tuple(unit * share for share in in_proportion(local // unit, weights))
    return Partition(w, padded, size, chunks, interleaved=whole_kv)


def indivisible(heads: int, kv_heads: int, size: int) -> str:
    """Why heads cannot be dealt to ranks, or "". Ranks split the KV heads, or whole groups of ranks share one."""
    if heads % size:
        return f"heads ({heads}) is not divisible by the {size} ranks"
    if kv_heads % size and size % kv_heads:
        return f"kv_heads ({kv_heads}) neither divides the {size} ranks nor is divisible by them"
    return ""


def _padded(w: Workload, size: int) -> Workload:
    """The least padded heads that can be dealt: more KV heads, or more queries to each."""
    candidates = [
        (kv * group, kv)
        for kv in range(w.kv_heads, MAX_PADDING * max(w.kv_heads, size) + 1)
        for group in range(w.group, MAX_PADDING * max(w.group, size) + 1)
        if not indivisible(kv * group, kv, size)
    ]
    heads, kv_heads = min(candidates)
    return w.replace(heads=heads, kv_heads=kv_heads)


def in_proportion(units: int, weights: tuple[int, ...]) -> list[int]:
    """Whole numbers above 0 that add up to `units`, about in proportion to the weights; fewer where units are few."""
    weights = weights[:units]
    shares = [max(1, units * weight // sum(weights)) for weight in weights]
    while sum(shares) > units:
        shares[shares.index(max(shares))] -= 1
    shares[0] += units - sum(shares)
    return shares
