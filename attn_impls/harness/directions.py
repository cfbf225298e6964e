"""The passes that distributed tests time, and which of them a run covers."""

from __future__ import annotations

import pytest

from .selection import Selection


def timed_direction(item: pytest.Item) -> str:
    """What a distributed test times, "forward" or "backward", as its marker says; "" for one that times nothing."""
    marker = item.get_closest_marker("distributed")
    return marker.kwargs.get("direction", "") if marker else ""


def left_out(item: pytest.Item, selection: Selection) -> bool:
    """Whether a distributed test times a direction that was not asked for."""
    direction = timed_direction(item)
    return bool(direction) and direction not in getattr(selection, "directions", ("forward",))
