"""What the rounds of several ranks say: speed-up, efficiency, exposed communication, the bound, and each rank's share."""

from __future__ import annotations

import statistics
from typing import Any

from ..parallel.plan import Plan, Traffic
from . import measure
from .clock import Clock
from .makespan import Probe, Track


def facts(plan: Plan, direction: str, timing: dict[str, Track], probe: Probe, clock: Clock) -> dict[str, Any]:
    """The flat extra_info that the rounds, the probe and one more call give. All ranks call it together."""
    track, ranks = timing["ranks"], probe.ranks
    alone, silent = timing.get("one rank"), timing.get("silent")
    found = measure.facts(measure.Timing(track.samples, alone.samples if alone else None, track.retries), clock)
    ratio = [found.pop(key) for key in ("vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high")]  # here: of one rank to all
    found.pop("sdpa_s")
    cost = measure.cost(track.call, clock, track.median)
    peaks, clocks, unsteady = zip(
        *ranks.exchange((cost["peak_bytes"], found["sm_mhz_median"], found["sm_clock_unsteady"])), strict=True
    )
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
        "host_us": cost["host_us"],
        "sm_mhz_by_rank": list(clocks),
        "sm_clock_unsteady": any(unsteady),
        "peak_bytes_by_rank": list(peaks),
        "peak_bytes": None if None in peaks else max(peaks),
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
