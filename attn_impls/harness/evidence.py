"""What pairs of measurements prove: their median against a floor and, from three pairs on, t bounds of their log ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

REGRESSED, IMPROVED, SAME, INCONCLUSIVE = "REGRESSED", "IMPROVED", "SAME", "INCONCLUSIVE"
CHANGED = (REGRESSED, IMPROVED)

DEFAULT_FLOOR = 0.03
CONFIDENCE = 0.99  # of each bound
MIN_PAIRS = 3
MIN_SPREAD = 0.001  # of log ratios: where a few pairs agree better than this, that is luck


class Evidence(NamedTuple):
    """Log ratios of candidate to baseline time (above 0: slower), judged."""

    verdict: str
    change: float  # the median of the log ratios
    low: float | None = None  # one-sided bounds of the mean log ratio; None for fewer than three pairs
    high: float | None = None
    spread: float = 0.0  # standard deviation of one pair's log ratio


def judge(logs: Sequence[float], floor: float = DEFAULT_FLOOR) -> Evidence:
    """The verdict on one log ratio a pair; floor is a share of the time, such as 0.03.

    One or two pairs are held to the floor alone: the rounds of one process are not independent, so they give no interval.
    From three on, a change is one whose median exceeds the floor and whose bound excludes 0, SAME has both bounds within
    the floor, and the rest is INCONCLUSIVE.
    """
    limit, change = math.log1p(floor), statistics.median(logs)
    if len(logs) < MIN_PAIRS:
        return Evidence(REGRESSED if change > limit else IMPROVED if change < -limit else SAME, change)
    low, high = bounds(logs)
    if change > limit and low > 0:
        verdict = REGRESSED
    elif change < -limit and high < 0:
        verdict = IMPROVED
    else:
        verdict = SAME if -limit <= low and high <= limit else INCONCLUSIVE
    return Evidence(verdict, change, low, high, statistics.stdev(logs))


def bounds(logs: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one-sided bound of the mean, each at CONFIDENCE, by Student's t."""
    mean, spread = statistics.fmean(logs), max(statistics.stdev(logs), MIN_SPREAD)
    reach = t_quantile(CONFIDENCE, len(logs) - 1) * spread / math.sqrt(len(logs))
    return mean - reach, mean + reach


def t_quantile(probability: float, df: int) -> float:
    """The t that Student's distribution with `df` degrees of freedom stays below with a probability of at least 0.5."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 2 * probability - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _within(angle: float, df: int) -> float:
    """P(|T| < sqrt(df)·tan(angle)), exact for whole df (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(df // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)


def upper_bound(failures: int, trials: int, confidence: float = 0.95) -> float:
    """The highest rate that is still compatible with so few failures (Clopper and Pearson, one-sided)."""
    low, high = 0.0, 1.0
    if failures >= trials:
        return 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures + 1))
        low, high = (rate, high) if chance > 1 - confidence else (low, rate)
    return high
