"""What the rounds of several ranks say, from rounds whose times are given."""

import math

import pytest

from attn_impls.harness import scaling
from attn_impls.harness.clock import HostClock, Sample
from attn_impls.harness.makespan import Track
from attn_impls.parallel.plan import Plan, Traffic


class OneRank:
    size = 1


class TwoRanks:
    size = 2


class Probe:
    """Every collective takes a second."""

    ranks = OneRank()

    def seconds(self, _):
        return 1.0

    def bus_bytes_per_s(self, _):
        return 1e9


class Sending(Plan):
    def traffic(self, direction="forward"):  # noqa: ARG002
        return (Traffic("all_gather", 64),)


def track(*seconds):
    samples = [Sample(one, one, math.nan, False) for one in seconds]
    return Track(lambda: None, samples=samples, by_rank=[[one] for one in seconds])


def facts(**tracks):
    return told(tracks, [scaling.OnRank(None, None, False)], Probe())


def told(timing, everyone, probe):
    return scaling.facts(Sending(None), "forward", timing, scaling.of_rounds(timing, HostClock()), everyone, probe)


def test_exposed_communication_is_told_round_by_round():
    """In most rounds sending takes 0.1 s more; the machine slows down meanwhile, and one round is far off."""
    silent, sending = (1.0, 1.0, 2.0, 3.0, 3.0), (1.1, 1.1, 0.9, 3.1, 3.1)
    found = facts(ranks=track(*sending), silent=track(*silent))
    assert found["silent_s"] == 2.0
    assert found["exposed_s"] == pytest.approx(0.1)  # the medians differ by -0.9


def test_what_sends_nothing_exposes_nothing():
    assert facts(ranks=track(1.0, 2.0))["exposed_s"] == 0.0


def test_a_throttled_rank_marks_the_case_whichever_it_is():
    one, probe = track(1.0, 1.0), Probe()
    one.by_rank, probe.ranks = [[1.0, 1.0]] * 2, TwoRanks()
    found = told({"ranks": one, "one rank": one}, [scaling.OnRank(1, 1900.0, False), scaling.OnRank(2, 1500.0, True)], probe)
    assert (found["sm_clock_unsteady"], found["sm_mhz_by_rank"]) == (True, [1900.0, 1500.0])
    assert (found["peak_bytes"], found["peak_bytes_by_rank"]) == (2, [1, 2])
    assert not found.keys() & {"vs_sdpa", "sdpa_s"}
