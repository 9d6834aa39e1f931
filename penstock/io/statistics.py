"""Medians and their intervals for a handful of measurements that drift."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Interval", "interval", "median", "quantile"]

Interval = tuple[float, float, float]
"""A median, and the two bounds that each hold it back with 95 % confidence: (median, lower, upper)."""


def median(values: Sequence[float]) -> float:
    """Return the middle of the values, or the mean of the two in the middle."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interval(values: Sequence[float], *, tail: float = 0.05) -> Interval:
    """Return the median and its bounds: the `tail` and 1 - `tail` quantiles of the bootstrap's medians.

    The bootstrap's distribution is known exactly (Efron 1979): a resample's middle value is at most the k-th smallest
    of n values with the probability that a binomial(n, k/n) count reaches the middle. So there is no chance in it, and
    below six values the bounds are the smallest and the largest.
    """
    ordered = sorted(values)
    count = len(ordered)
    rank = next(k for k in range(1, count + 1) if _middle_at_most(count, k) >= tail)
    return median(ordered), ordered[rank - 1], ordered[count - rank]


def _middle_at_most(count: int, k: int) -> float:
    """Return the chance that the lower middle of `count` draws is among the `k` smallest values."""
    share = k / count
    needed = (count + 1) // 2
    return sum(
        math.comb(count, hits) * share**hits * (1 - share) ** (count - hits) for hits in range(needed, count + 1)
    )
