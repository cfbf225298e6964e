"""Whether tensors are what they were: a kernel that writes past its output changes those of others, who would look wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class Marks:
    """The sums of the bits of some tensors, by a name of what holds them: nearly all that is written on them shows, and
    values that changed places do not."""

    def __init__(self) -> None:
        self._holders: dict[str, list[Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, int]] = {}  # by the tensor's id

    def add(self, holders: Mapping[str, Any]) -> None:
        """Mark what is new: tensors, also in tuples, dicts and dataclasses."""
        new = {name: list(_tensors(holder)) for name, holder in holders.items() if name not in self._holders}
        tensors = {id(tensor): tensor for found in new.values() for tensor in found if id(tensor) not in self._sums}
        self._sums |= {one: (tensors[one], bits) for one, bits in zip(tensors, _sums(list(tensors.values())), strict=True)}
        self._holders |= new

    def broken(self) -> str:
        """The first name whose tensors have changed since, or ""."""
        now = _sums([tensor for tensor, _ in self._sums.values()])
        changed = {one for (one, (_, before)), bits in zip(self._sums.items(), now, strict=True) if bits != before}
        return next((name for name, found in self._holders.items() if not changed.isdisjoint(map(id, found))), "")


def _tensors(holder: Any) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, Mapping):
        yield from _tensors(tuple(holder.values()))
    elif isinstance(holder, (tuple, list)):
        for part in holder:
            yield from _tensors(part)
    elif is_dataclass(holder):
        yield from _tensors([getattr(holder, field.name) for field in fields(holder)])


def as_integers(tensor: Tensor) -> Tensor:
    """Its bits, eight bytes at a time where they fit: a sum or comparison of them takes less time and memory."""
    try:
        return tensor.view(torch.int64)
    except RuntimeError:  # rows that are no whole number of them, or not contiguous
        return tensor.flatten().view(INTEGERS[tensor.element_size()])


def _sums(tensors: list[Tensor]) -> list[int]:
    """Of each tensor's bits, taken for integers; one wait for all."""
    sums = [as_integers(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).tolist() if sums else []
