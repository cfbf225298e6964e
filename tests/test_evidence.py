"""The statistics behind compare and the gate: quantiles against published tables, verdicts, and what they cost in error."""

import math
import random

import pytest

from attn_impls.harness.evidence import (
    IMPROVED,
    INCONCLUSIVE,
    REGRESSED,
    SAME,
    bounds,
    judge,
    t_quantile,
    upper_bound,
)

# Student's t, one-sided: any statistics textbook's table
TABLE = {
    (0.95, 1): 6.314, (0.95, 2): 2.920, (0.95, 4): 2.132, (0.95, 9): 1.833, (0.95, 30): 1.697,
    (0.975, 3): 3.182, (0.975, 10): 2.228, (0.99, 1): 31.821, (0.99, 2): 6.965, (0.99, 3): 4.541,
    (0.99, 4): 3.747, (0.99, 6): 3.143, (0.99, 9): 2.821, (0.99, 29): 2.462, (0.995, 5): 4.032, (0.999, 2): 22.327,
}  # fmt: skip


@pytest.mark.parametrize(("probability", "df"), TABLE)
def test_t_quantile_is_the_table_s(probability, df):
    assert t_quantile(probability, df) == pytest.approx(TABLE[probability, df], abs=5.1e-4)


def test_t_quantile_of_many_degrees_is_the_normal_one():
    assert t_quantile(0.99, 5000) == pytest.approx(2.3263, abs=1e-3)


def test_bounds_are_those_of_the_mean():
    logs = [0.01, 0.02, 0.06]
    mean, error = 0.03, math.sqrt(((0.02) ** 2 + 0.01**2 + 0.03**2) / 2 / 3)
    assert bounds(logs) == pytest.approx((mean - 6.9646 * error, mean + 6.9646 * error), rel=1e-4)


def test_pairs_that_agree_by_luck_do_not_prove():
    low, high = bounds([0.02, 0.02, 0.02])
    assert low < 0.018
    assert high > 0.022


@pytest.mark.parametrize(
    ("logs", "verdict"),
    [
        ([0.031], REGRESSED),
        ([0.029], SAME),
        ([-0.029], SAME),
        ([-0.031], IMPROVED),
        ([0.05, 0.0], SAME),  # two pairs: their median
        ([0.05, 0.051, 0.049], REGRESSED),
        ([0.05, 0.05, -0.05], INCONCLUSIVE),  # the median is past the floor, and the bound is not
        ([0.02, 0.021, 0.02], SAME),  # proven, and smaller than the floor
        ([0.0, 0.001, -0.001], SAME),
        ([0.0, 0.02, -0.02], INCONCLUSIVE),
        ([-0.05, -0.051, -0.049], IMPROVED),
        ([0.04, 0.05, 0.06, 0.05, -0.01], INCONCLUSIVE),
        ([0.04, 0.05, 0.06, 0.05, 0.03], REGRESSED),
    ],
)
def test_verdicts(logs, verdict):
    assert judge(logs, 0.03).verdict == verdict


def test_the_floor_is_a_share_of_time():
    assert judge([math.log(1.0999)], 0.1).verdict == SAME
    assert judge([math.log(1.1001)], 0.1).verdict == REGRESSED
    assert judge([-math.log(1.1001)], 0.1).verdict == IMPROVED


def simulated(effect, trials=500, pairs=5):
    """The share of gates that fail, under noise of 0.4 % a run, of which 4 % are 2.5 % off."""
    draw = random.Random(0)

    def run():
        return draw.gauss(0, 0.004) + draw.gauss(0, 0.001) + (0.025 if draw.random() < 0.04 else 0)

    failed = 0
    for _ in range(trials):
        logs = [math.log1p(effect) + run() - run() for _ in range(pairs)]
        failed += judge(logs, 0.03).verdict == REGRESSED
    return failed / trials


def test_noise_alone_does_not_fail_and_five_percent_does():
    assert simulated(0.0) <= 0.002
    assert simulated(0.05) >= 0.97
    assert 0.0 <= simulated(0.02) < 0.2


def test_upper_bound_is_clopper_and_pearson_s():
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert upper_bound(1, 20) == pytest.approx(0.2161, abs=1e-4)
    assert upper_bound(20, 20) == 1
