"""What the rounds of several ranks say: speed-up, efficiency, exposed communication, the bound, and each rank's share."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from ..parallel.plan import Plan, Traffic
from . import measure
from .clock import Clock
from .makespan import Probe, Track


class OnRank(NamedTuple):
    """What a rank tells the others of its own device."""

    peak_bytes: int | None
    sm_mhz: float | None
    sm_clock_unsteady: bool


def of_rounds(timing: dict[str, Track], clock: Clock) -> dict[str, Any]:
    """The flat extra_info that this rank's samples give."""
    track, alone = timing["ranks"], timing.get("one rank")
    found = measure.facts(measure.Timing(track.samples, alone.samples if alone else None, track.retries), clock)
    found.pop("sdpa_s")  # the baseline here is one rank
    return found


def facts(
    plan: Plan, direction: str, timing: dict[str, Track], found: dict[str, Any], everyone: list[OnRank], probe: Probe
) -> dict[str, Any]:
    """The flat extra_info that the rounds, all ranks and the probe give. All ranks call it together.

    found: of_rounds, with host_us.
    """
    track, ranks = timing["ranks"], probe.ranks
    alone, silent = timing.get("one rank"), timing.get("silent")
    ratio = [found.pop(key) for key in ("vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high")]  # here: of one rank to all
    peaks = [one.peak_bytes for one in everyone]
    found |= {
        **dict(zip(("speedup", "speedup_ci_low", "speedup_ci_high"), ratio, strict=True)),
        "efficiency": ratio[0] and ratio[0] / ranks.size,
        "one_rank_s": alone and alone.median,
        "one_rank_median_s_by_rank": alone and alone.rank_medians,
        "median_s_by_rank": track.rank_medians,
        "slowest_rank": max(range(ranks.size), key=track.rank_medians.__getitem__),
        "imbalance": track.imbalance,
        "silent_s": silent and silent.median,
        "exposed_s": exposed_seconds(track, silent) if silent else 0.0,
        "padding_bound": plan.bound,
        "sm_mhz_by_rank": [one.sm_mhz for one in everyone],
        "sm_clock_unsteady": any(one.sm_clock_unsteady for one in everyone),
        "peak_bytes_by_rank": peaks,
        "peak_bytes": None if None in peaks else max(peak for peak in peaks if peak is not None),
    }
    sent = plan.traffic(direction)
    found |= probed(sent, probe) if sent else {}
    bound = bound_seconds(plan.bound, sent, alone.median if alone else None, found.get("probe_s", 0.0), ranks.size)
    return found | {"bound_s": bound, "percent_of_bound": bound and 100 * bound / track.median}


def exposed_seconds(track: Track, silent: Track) -> float:
    """The median over rounds of what sending adds to a round: a clock that falls under load slows both of a round's calls."""
    rounds = zip(track.samples, silent.samples, strict=True)
    return statistics.median(sending.seconds - nothing.seconds for sending, nothing in rounds)


def probed(sent: tuple[Traffic, ...], probe: Probe) -> dict[str, Any]:
    """What this session's bare collectives do with the same bytes, one after another; the bus bandwidth of the largest."""
    return {
        "collective": " + ".join(dict.fromkeys(traffic.collective for traffic in sent)),
        "message_bytes": sum(traffic.bytes for traffic in sent),
        "probe_s": sum(probe.seconds(traffic) for traffic in sent),
        "probe_bus_gb_per_s": probe.bus_bytes_per_s(max(sent, key=lambda traffic: traffic.bytes)) / 1e9,
    }


def bound_seconds(
    padding: float, sent: tuple[Traffic, ...], alone: float | None, communication: float, size: int
) -> float | None:
    """The least time of a form: one rank's time shared out (padding included), with the bare collectives beside or behind it."""
    if alone is None:
        return None
    compute = alone / size / padding
    return max(compute, communication) if any(traffic.overlapped for traffic in sent) else compute + communication
