"""Whether tensors are what they were: a kernel that writes past its output changes those of others, who would look wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class Marks:
    """The sums of the bits of some tensors, by a name of what holds them."""

    def __init__(self) -> None:
        self._marked: dict[str, tuple[list[Tensor], list[int]]] = {}

    def add(self, holders: Mapping[str, Any]) -> None:
        """Mark what is new: tensors, also in tuples, dicts and dataclasses."""
        new = {name: list(_tensors(holder)) for name, holder in holders.items() if name not in self._marked}
        sums = iter(_sums([tensor for tensors in new.values() for tensor in tensors]))
        self._marked |= {name: (tensors, [next(sums) for _ in tensors]) for name, tensors in new.items()}

    def broken(self) -> str:
        """The first name whose tensors have changed since, or ""."""
        sums = iter(_sums([tensor for tensors, _ in self._marked.values() for tensor in tensors]))
        now = {name: [next(sums) for _ in tensors] for name, (tensors, _) in self._marked.items()}
        return next((name for name, (_, before) in self._marked.items() if now[name] != before), "")

    def clear(self) -> None:
        self._marked.clear()


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


def _sums(tensors: list[Tensor]) -> list[int]:
    """Of each tensor's bits, taken for integers; one wait for all."""
    sums = [tensor.flatten().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).tolist() if sums else []
