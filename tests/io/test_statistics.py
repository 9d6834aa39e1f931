import random

import pytest

from penstock.io.statistics import interval, median, quantile


def test_median_and_quantiles():
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    assert quantile([1, 2, 3, 4, 5], 0.5) == 3
    assert quantile([10, 0], 0.25) == 2.5
    assert quantile([7], 0.9) == 7


@pytest.mark.parametrize(("count", "lowest_rank"), [(1, 1), (3, 1), (5, 1), (7, 2), (9, 3), (25, 9)])
def test_bounds_are_ranks_that_only_the_count_decides(count, lowest_rank):
    middle, lower, upper = interval([float(value) for value in range(1, count + 1)])
    assert (middle, lower, upper) == ((count + 1) / 2, lowest_rank, count + 1 - lowest_rank)


def test_the_exact_bootstrap_is_what_resampling_finds():
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 3.0, 8.0, 7.0, 6.0]
    rng = random.Random(0)
    resampled = sorted(median(rng.choices(values, k=len(values))) for _ in range(20_000))
    _, lower, upper = interval(values)
    assert lower == resampled[1000]
    assert upper == resampled[19_000]


def test_a_wider_interval_has_a_smaller_tail():
    values = [float(value) for value in range(15)]
    _, narrow, _ = interval(values)
    _, wide, _ = interval(values, tail=0.025)
    assert wide <= narrow
