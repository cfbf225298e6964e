"""The collectives that move one tensor, under the names that this torch has for them, and the groups that share KV heads."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renames both and warns at every call of the old names
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(into: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Start to gather every rank's `part` into contiguous `into`, rank after rank; `wait()` on what it returns."""
    return _all_gather(into.view(-1), part.contiguous().view(-1), group=group, async_op=True)


def reduce_scatter(into: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum `whole` over the ranks; rank r keeps the r-th of `size` equal parts, in `into`."""
    _reduce_scatter(into.view(-1), whole.view(-1), group=group)


@functools.cache
def neighbours(rank: int, size: int, together: int) -> dist.ProcessGroup:
    """This rank's group where each `together` ranks in a row make one. All ranks call it; made once a run."""
    groups = [dist.new_group(list(range(first, first + together))) for first in range(0, size, together)]
    return groups[rank // together]
