"""A round takes as long as its slowest rank: one rank is slowed by a known time, and another shares nothing but the wait."""

import statistics
import time
from functools import partial

import pytest
import torch
from fakes import Rounds as Pedantic

from attn_impls import Workload
from attn_impls.harness.case import Case
from attn_impls.harness.judge import Problem
from attn_impls.harness.makespan import Probe, Rounds
from attn_impls.parallel import Form
from attn_impls.parallel.plan import Traffic
from attn_impls.parallel.tensor import Core
from attn_impls.registry import REGISTRY, discover

pytestmark = pytest.mark.distributed(strategy="tensor")

CYCLES = {"short": 200_000, "long": 1_200_000}  # of a device's spin
SECONDS = {"short": 2e-3, "long": 12e-3}  # of a host's


def wait(device, length):
    if device == "cuda":
        torch.cuda._sleep(CYCLES[length])
        return
    until = time.perf_counter() + SECONDS[length]
    while time.perf_counter() < until:
        time.sleep(1e-4)  # ranks may share a core


def added_seconds(device, samples):
    if device == "cpu":
        return SECONDS["long"] - SECONDS["short"]
    return (CYCLES["long"] - CYCLES["short"]) / (statistics.median(sample.sm_mhz for sample in samples) * 1e6)


def test_a_slowed_rank_is_the_makespan(spreads, capsys):
    ranks, device, clock = spreads.ranks, spreads.session.device, spreads.session.clock
    slow = ranks.size - 1
    calls = {
        "slowed": partial(wait, device, "long" if ranks.rank == slow else "short"),
        "even": partial(wait, device, "short"),
    }
    timing = Rounds(ranks, clock, calls).run(Pedantic(), 20, 2)
    extra = timing["slowed"].median - timing["even"].median
    expected = ranks.exchange(added_seconds(device, timing["slowed"].samples))[slow]
    with capsys.disabled():
        if ranks.rank == 0:
            print(f"\n  slowed by {expected * 1e6:.1f} µs, makespan longer by {extra * 1e6:.1f} µs", end="")
    assert extra == pytest.approx(expected, rel=0.01 if device == "cuda" else 0.15)
    medians = timing["slowed"].rank_medians
    assert medians.index(max(medians)) == slow
    assert [sample.seconds for sample in timing["slowed"].samples] == [max(one) for one in timing["slowed"].by_rank]
    if ranks.size > 1:
        assert timing["slowed"].imbalance > 1.2
        assert max(medians[:slow]) < medians[slow] / 2
    same = ranks.exchange([sample.seconds for sample in timing["slowed"].samples])
    assert all(one == same[0] for one in same)


def test_a_probe_s_bus_bandwidth_follows_its_time(spreads):
    probe = Probe(spreads.ranks, spreads.session.clock, spreads.session.device)
    n, size = spreads.ranks.size, 1 << 16
    for collective, factor in (("all_gather", n - 1), ("all_reduce", 2 * (n - 1) / n), ("reduce_scatter", (n - 1) / n)):
        traffic = Traffic(collective, size)
        seconds = probe.seconds(traffic)
        assert seconds > 0
        assert probe.bus_bytes_per_s(traffic) == pytest.approx(factor * size / seconds)


def best_efficiency(heads, length, ranks, rows=128):
    """What a kernel whose tiles of `rows` query rows fill the SMs in waves can reach: the last wave may be nearly empty."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    whole, share = (-(-n * -(-length // rows) // sms) for n in (heads, heads // ranks))
    return min(1.0, whole / (ranks * share))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "fill"),
    [(8192, "randn"), (32768, "zeros")],  # 14 ms of randn bring a card to its power limit, and then each card has its own clock
)
def test_core_efficiency(spreads, length, fill, capsys):
    """No communication, and each rank still fills its SMs: N ranks are N times as fast, as far as whole waves of tiles allow."""
    discover()
    w, ranks = Workload.parse(f"b1-h32-s{length}-d128-bf16"), spreads.ranks
    case, problem = Case(w, REGISTRY["sdpa-cudnn"], "cuda"), Problem(w, "cuda", 0)
    tensors = problem.plain if fill == "randn" else [torch.zeros_like(tensor) for tensor in problem.plain]
    plan = spreads.plan(case, Form("core", Core), problem)
    with torch.device("cuda"):
        whole = case.implementation(w)
    calls = {"ranks": partial(plan, plan.share(*tensors)), "one rank": partial(whole, *tensors)}
    timing = Rounds(ranks, spreads.session.clock, calls).run(Pedantic(), 50, 10)
    pairs = zip(timing["one rank"].samples, timing["ranks"].samples, strict=True)
    efficiency = statistics.median(one.seconds / all_.seconds for one, all_ in pairs) / ranks.size
    best = best_efficiency(w.heads, length, ranks.size)
    with capsys.disabled():
        if ranks.rank == 0:
            print(
                f"\n  core efficiency at {length}: {efficiency:.4f} of at most {best:.4f}, "
                f"by rank {timing['ranks'].rank_medians}",
                end="",
            )
    assert efficiency >= 0.99 * best
