"""The collectives that move one tensor, under the names that this torch has for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renames both and warns at every call of the old names
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(into: torch.Tensor, part: torch.Tensor) -> dist.Work:
    """Start to gather every rank's `part` into contiguous `into`, rank after rank; `wait()` on what it returns."""
    return _all_gather(into.view(-1), part.contiguous().view(-1), async_op=True)


def reduce_scatter(into: torch.Tensor, whole: torch.Tensor) -> None:
    """Sum `whole` over the ranks; rank r keeps the r-th of `size` equal parts, in `into`."""
    _reduce_scatter(into.view(-1), whole.view(-1))
