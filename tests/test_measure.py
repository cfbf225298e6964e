"""Rounds, plans, paired ratios and flags of a timed case, with a fake clock and with pytest-benchmark's own fixture."""

import itertools
import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest

from attn_impls.harness import measure
from attn_impls.harness.clock import HostClock, Sample
from attn_impls.harness.measure import Timing, facts, paired_ratio

pytest_plugins = ["pytester"]

CASE, BASELINE = "case", "baseline"


class FakeClock:
    """Samples whose seconds count up; each round costs the host some seconds of the fake `perf_counter`."""

    cold_l2, overhead, retries = True, 2e-6, 0

    def __init__(self, timer="device", cost=1e-3, seconds=lambda n: float(n)):
        self.timer, self.cost, self.seconds = timer, cost, seconds
        self.now = self.perf_counter = 0.0
        self.resets = 0
        self.log = []

    def reset(self):
        self.resets += 1

    def prepare(self, _subject):
        self.log.append("prepare")

    def sample(self, subject):
        subject.call()
        self.log.append(subject)
        self.perf_counter += self.cost
        found = Sample(self.seconds(len(self.log)), 1e-5, 1500.0, False)
        subject.samples.append(found)
        self.now += found.seconds
        return found


class FakeBenchmark:
    """pytest-benchmark's pedantic in short; `data` is what it would store."""

    def __init__(self, clock):
        self.clock, self.has_error, self.data, self.given = clock, False, [], None

    def pedantic(self, target, setup, teardown, rounds, warmup_rounds):
        self.given = rounds, warmup_rounds
        for n in range(warmup_rounds + rounds):
            setup()
            start = self.clock.now
            target()
            if n >= warmup_rounds:
                self.data.append(self.clock.now - start)
            teardown()


@pytest.fixture
def run(monkeypatch):
    def run(clock, baseline=True, **options):
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.perf_counter))
        benchmark, calls = FakeBenchmark(clock), []
        call, other = (lambda: calls.append(CASE)), (lambda: calls.append(BASELINE))
        timing = measure.run(benchmark, clock, call, other if baseline else None, **options)
        return timing, benchmark, calls

    return run


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_baseline_and_case_alternate(run, warmup):
    clock = FakeClock()
    _, benchmark, calls = run(clock, rounds=6, warmup_rounds=warmup)
    assert benchmark.given == (6, warmup)
    rounds = [calls[n : n + 2] for n in range(len(calls) - 2 * (6 + warmup), len(calls), 2)]
    assert rounds == [[BASELINE, CASE] if n % 2 == 0 else [CASE, BASELINE] for n in range(6 + warmup)]
    assert clock.log[::2] == ["prepare"] * (len(clock.log) // 2)  # exactly one before each sample
    assert "prepare" not in clock.log[1::2]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_timing_holds_the_timed_rounds_only(run, rounds, warmup):
    timing, benchmark, _ = run(FakeClock(), rounds=rounds, warmup_rounds=warmup)
    assert [sample.seconds for sample in timing.samples] == benchmark.data
    assert len(timing.samples) == len(timing.baseline) == rounds
    both = [sorted(pair) for pair in zip(timing.samples, timing.baseline, strict=True)]
    assert all(later.seconds - earlier.seconds == 2 for earlier, later in both)  # of one round, neighbours in the log
    assert timing.median == statistics.median(benchmark.data)


def test_outputs_of_the_case_are_seen_and_not_the_baseline_s():
    seen, clock, made = [], HostClock(), itertools.count()
    measure.run(FakeBenchmark(clock), clock, lambda: next(made), lambda: BASELINE, 5, 3, seen.append)
    assert len(seen) == 3 + 5
    assert BASELINE not in seen


def test_without_a_baseline_only_the_case_runs(run):
    timing, _, calls = run(FakeClock(), baseline=False, rounds=5, warmup_rounds=2)
    assert timing.baseline is None
    assert set(calls) == {CASE}
    assert paired_ratio(timing) is None


@pytest.mark.parametrize(
    ("cost", "seconds", "baseline", "planned"),
    [
        (2**-20, 1e-5, False, (100, 5)),  # both at their most
        (2**-9, 1e-5, False, (61, 5)),  # 0.12 s / 2 ms
        (2**-8, 1e-5, False, (30, 5)),  # 0.12 s / 4 ms
        (2**-7, 1e-5, False, (25, 5)),  # enough of a short call
        (2**-8, 1e-3, False, (50, 5)),  # enough of a longer one, within 2 s
        (2**-5, 1e-2, False, (50, 5)),
        (2**-5, 1e-2, True, (32, 4)),  # 2 s and 0.2 s / 62 ms: a round holds two calls
        (2**-3, 1e-1, False, (20, 3)),  # both at their least
        (4.0, 1.0, True, (20, 3)),
    ],
)
def test_rounds_fit_the_time_there_is(run, cost, seconds, baseline, planned):
    _, benchmark, _ = run(FakeClock(cost=cost, seconds=lambda _: seconds), baseline)
    assert benchmark.given == planned


@pytest.mark.parametrize(("baseline", "warmup"), [(False, 100), (True, 50)])
def test_a_cpu_loops_for_a_millisecond_and_warms_up_for_100_ms(run, baseline, warmup):
    loops, clock = set(), FakeClock("host", cost=1e-9, seconds=lambda _: 2**-14)
    real = clock.sample

    def sample(subject):
        loops.add(subject.loops)
        return real(subject)

    clock.sample = sample
    _, benchmark, _ = run(clock, baseline)
    assert benchmark.given == (100, warmup)
    assert loops == {1, math.ceil(1e-3 * 2**14)}  # 1 to estimate


def test_a_slow_cpu_call_is_not_looped(run):
    clock = FakeClock("host", cost=0.5, seconds=lambda _: 0.5)
    _, benchmark, calls = run(clock, baseline=False)
    assert benchmark.given == (7, 3)
    assert len(calls) == 2 + 7 + 3


@pytest.mark.parametrize(("options", "given"), [({"rounds": 7}, (7, 5)), ({"warmup_rounds": 0}, (60, 0))])
def test_options_replace_the_plan(run, options, given):
    assert run(FakeClock(), **options)[1].given == given


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("culprit", [CASE, BASELINE])
def test_an_interrupted_case_is_not_saved(error, culprit):
    clock, calls = FakeClock(), []
    benchmark = FakeBenchmark(clock)

    def call(name):
        calls.append(name)
        if name == culprit and calls.count(name) == 5:
            raise error

    with pytest.raises(error):
        measure.run(benchmark, clock, lambda: call(CASE), lambda: call(BASELINE), rounds=9, warmup_rounds=1)
    assert benchmark.has_error
    assert len(benchmark.data) <= 3


def test_a_finished_case_has_no_error(run):
    assert run(FakeClock(), rounds=3)[1].has_error is False


def test_retries_are_those_of_the_case(run):
    clock = FakeClock()
    clock.retries = 40  # of earlier cases
    real = clock.sample

    def sample(subject):
        clock.retries += len(subject.samples) == 4
        return real(subject)

    clock.sample = sample
    assert run(clock, rounds=5, warmup_rounds=0)[0].retries == 2


def samples(seconds, mhz=1500.0, late=False):
    return [Sample(s, 1e-5, mhz, late) for s in seconds]


def simulated(rng, ratio, rounds, drift=lambda _: 1.0, noise=0.02):
    """A case of 1 ms beside a baseline of `ratio` ms, both subject to the round's drift and each to its own noise."""
    pair = [[1e-3 * size * drift(n) * rng.lognormvariate(0, noise) for n in range(rounds)] for size in (1, ratio)]
    return Timing(samples(pair[0]), samples(pair[1]), 0)


@pytest.mark.parametrize("rounds", [20, 49, 100])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_the_interval_holds_the_truth_in_95_of_100_cases(rounds, ratio):
    rng, cases = random.Random(f"{rounds} {ratio}"), 600
    found = [paired_ratio(simulated(rng, ratio, rounds)) for _ in range(cases)]
    covered = sum(low <= ratio <= high for _, low, high in found) / cases
    assert 0.935 <= covered <= 0.998  # 20 rounds: 98.8 % by the binomial, since ranks are whole numbers
    assert statistics.mean(median for median, _, _ in found) == pytest.approx(ratio, rel=0.002)
    assert all(low <= median <= high for median, low, high in found)


@pytest.mark.parametrize(("rounds", "ranks"), [(100, (40, 61)), (20, (5, 16))])
def test_the_interval_is_that_of_the_median_s_order_statistics(rounds, ranks):
    timing = Timing(samples([1.0] * rounds), samples([float(n) for n in range(rounds, 0, -1)]), 0)
    assert paired_ratio(timing) == (statistics.median(range(1, rounds + 1)), *ranks)


@pytest.mark.parametrize("drift", [lambda n: 1 + n / 50, lambda n: 1.0 if n < 37 else 1.4, lambda n: 1 + 0.3 * math.sin(n)])
def test_drift_common_to_both_cancels(drift):
    timing = simulated(random.Random(7), 1.5, 100, drift, noise=0.002)
    median, low, high = paired_ratio(timing)
    assert median == pytest.approx(1.5, rel=0.002)
    assert high - low < 0.004
    spread = statistics.quantiles([sample.seconds for sample in timing.samples])
    assert spread[2] - spread[0] > 0.1 * spread[1]  # what the pairing took out


def test_a_ratio_above_one_means_faster_than_the_baseline():
    assert paired_ratio(Timing(samples([1e-3] * 30), samples([2e-3] * 30), 0)) == (2.0, 2.0, 2.0)


def test_a_ratio_survives_samples_of_no_time():
    assert paired_ratio(Timing(samples([0.0] + 7 * [1.0]), samples([3.0] + 7 * [2.0]), 0))[0] == 2.0
    assert paired_ratio(Timing(samples([0.0, -1e-9]), samples([3.0, 2.0]), 0)) is None


FACTS = {
    "timer", "overhead_us", "raw_median_us", "host_bound", "late_rounds", "late_baseline_rounds", "remeasured_rounds", "cold_l2",
    "sdpa_s",
    "sm_mhz_median", "sm_mhz_p5", "sm_clock_unsteady", "vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high",
}  # fmt: skip


def test_facts_of_a_device_case():
    found = facts(Timing(samples(3 * [4e-5] + [5e-5] + 3 * [9e-5]), samples([1e-4] * 7), 3), FakeClock())
    assert set(found) == FACTS
    assert found["timer"] == "device"
    assert found["cold_l2"] is True
    assert found["overhead_us"] == pytest.approx(2)
    assert found["raw_median_us"] == pytest.approx(52)
    assert found["remeasured_rounds"] == 3
    assert (found["sm_mhz_median"], found["sm_mhz_p5"], found["sm_clock_unsteady"]) == (1500.0, 1500.0, False)
    assert found["vs_sdpa"] == pytest.approx(2.0)
    assert found["vs_sdpa_ci_low"] <= found["vs_sdpa"] <= found["vs_sdpa_ci_high"]
    assert found["sdpa_s"] == 1e-4


def test_facts_of_a_cpu_case():
    clock = SimpleNamespace(timer="host", overhead=0.0, cold_l2=False)
    found = facts(Timing(samples([1.0] * 5, mhz=float("nan")), None, 0), clock)
    assert set(found) == FACTS
    nothing = ("sm_mhz_median", "sm_mhz_p5", "vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high", "sdpa_s")
    assert [found[key] for key in nothing] == [None] * 6
    assert found["sm_clock_unsteady"] is False
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("late", "told"), [(0, True), (10, True), (11, False)])
def test_a_baseline_that_measured_the_host_is_no_baseline(late, told):
    baseline = samples([1.0] * late, late=True) + samples([1.0] * (20 - late))
    found = facts(Timing(samples([1.0] * 20), baseline, 0), FakeClock())
    assert (found["vs_sdpa"] == 1.0) == told
    assert found["late_baseline_rounds"] == late


def test_rounds_without_a_reading_of_the_sm_clock_do_not_count_for_it():
    found = facts(Timing(samples([1.0] * 9, mhz=float("nan")) + samples([1.0], mhz=1700.0), None, 0), FakeClock())
    assert (found["sm_mhz_median"], found["sm_mhz_p5"], found["sm_clock_unsteady"]) == (1700.0, 1700.0, False)


@pytest.mark.parametrize(("late", "bound"), [(0, False), (1, False), (10, False), (11, True), (20, True)])
def test_host_bound_is_more_than_half_of_the_rounds(late, bound):
    timing = Timing(samples([1.0] * late, late=True) + samples([1.0] * (20 - late)), None, 0)
    found = facts(timing, FakeClock())
    assert (found["host_bound"], found["late_rounds"]) == (bound, late)


@pytest.mark.parametrize(
    ("slow", "mhz", "p5", "unsteady"),
    [
        (0, 1000.0, 2000.0, False),
        (4, 1000.0, 2000.0, False),  # of 100: below the 5th percentile
        (6, 1000.0, 1000.0, True),
        (30, 1899.0, 1899.0, True),
        (30, 1901.0, 1901.0, False),  # within 5 % of the median
    ],
)
def test_an_unsteady_sm_clock_is_flagged(slow, mhz, p5, unsteady):
    timing = Timing(samples([1.0] * (100 - slow), 2000.0) + samples([1.0] * slow, mhz), None, 0)
    found = facts(timing, FakeClock())
    assert (found["sm_mhz_median"], found["sm_mhz_p5"], found["sm_clock_unsteady"]) == (2000.0, p5, unsteady)


@pytest.mark.parametrize("rounds", [1, 5, 6])
def test_no_interval_where_too_few_rounds_can_give_one(rounds):
    found = paired_ratio(Timing(samples([1.0] * rounds), samples([2.0] * rounds), 0))
    assert found == (None if rounds < 6 else (2.0, 2.0, 2.0))


INNER = """
    import json
    from pathlib import Path

    import pytest

    from attn_impls.harness import measure
    from attn_impls.harness.clock import HostClock

    class Now:
        seconds = 0.0

    clock = HostClock(lambda: Now.seconds)

    @pytest.mark.benchmark(timer=clock)
    def test_case(benchmark):
        costs = iter(range(1, 10_000))

        def call():
            Now.seconds += 2.0 ** -8 * next(costs)

        def baseline():
            Now.seconds += 1.0

        timing = measure.run(benchmark, clock, call, baseline, rounds=9, warmup_rounds=3)
        if benchmark.enabled:
            seconds = [[sample.seconds for sample in side] for side in (timing.samples, timing.baseline)]
            Path("samples.json").write_text(json.dumps(seconds))
"""


@pytest.fixture
def inner_run(pytester, monkeypatch):
    def run(*options):
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
            monkeypatch.delenv(name, raising=False)  # the outer run's: a worker's benchmarks are disabled
        pytester.makepyfile(INNER)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-q", *options)
        result.assert_outcomes(passed=1)

    return run


@pytest.mark.parametrize("options", [(), ("--benchmark-cprofile=cumtime",)], ids=["plain", "cprofile"])
def test_pytest_benchmark_stores_the_clock_s_samples(pytester, inner_run, options):
    inner_run("--benchmark-json=run.json", *options)
    ours, baseline = json.loads(pytester.path.joinpath("samples.json").read_text())
    stats = json.loads(pytester.path.joinpath("run.json").read_text())["benchmarks"][0]["stats"]
    assert stats["data"] == pytest.approx([2.0**-8 * n for n in range(6, 15)], rel=1e-12)  # after 2 to plan and 3 to warm up
    assert ours == pytest.approx(stats["data"], rel=1e-12)
    assert baseline == [1.0] * 9
    assert (stats["rounds"], stats["iterations"]) == (9, 1)
    assert stats["median"] == pytest.approx(statistics.median(ours), rel=1e-12)


def test_disabled_benchmarks_run_the_call_without_rounds(pytester, inner_run):
    inner_run("--benchmark-disable")
    assert not pytester.path.joinpath("samples.json").exists()
