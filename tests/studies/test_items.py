"""Comparisons over items and seeds: textbook formulas, and coverage where the truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from lm.studies import items

REPEATS = 1500


def scores(rng, seeds, count, of_seed, of_item, rest, truth=0.3):
    """Two models [S, I]: items differ much, and the difference has effects of seed and item."""
    first = rng.normal(0, 3, count) + rng.normal(0, 1, (seeds, count))
    difference = truth + of_seed * rng.normal(size=(seeds, 1)) + of_item * rng.normal(size=count)
    return first, first + difference + rest * rng.normal(size=(seeds, count))


def covered(seeds, count, effects, compare=items.compare):
    rng = np.random.default_rng(seeds * 1000 + count)
    found = [compare(*scores(rng, seeds, count, *effects)) for _ in range(REPEATS)]
    return sum(one.low <= 0.3 <= one.high for one in found)


def slack(rate):
    return 4 * math.sqrt(REPEATS * rate * (1 - rate))


CASES = {
    "all": (5, 40, (0.3, 2.0, 1.0)),
    "seeds": (4, 200, (0.5, 0.0, 1.0)),
    "items": (3, 30, (0.0, 1.0, 0.5)),
    "rest": (5, 20, (0.0, 0.0, 1.0)),
    "one seed": (1, 40, (0.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_the_truth_at_least_at_the_stated_rate(case):
    assert covered(*CASES[case]) > 0.95 * REPEATS - slack(0.95)


def test_the_interval_is_no_trivial_one():
    assert covered(*CASES["all"]) < 0.985 * REPEATS


def test_items_alone_do_not_cover_what_other_seeds_would_give():
    def naive(first, second):
        return items.compare(first.mean(axis=0)[None], second.mean(axis=0)[None])

    assert covered(*CASES["seeds"], naive) < 0.8 * REPEATS
    assert covered(*CASES["all"][:2], (1.0, 2.0, 1.0), naive) < 0.9 * REPEATS


def test_one_seed_is_the_paired_t_test_of_items():
    first, second = scores(np.random.default_rng(0), 1, 25, 0.0, 1.0, 1.0)
    found = items.compare(first, second, comparisons=4, confidence=0.9)
    reference = stats.ttest_rel(second[0], first[0])
    ends = reference.confidence_interval(1 - 0.1 / 4)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.standard_error == pytest.approx(stats.sem((second - first)[0]))
    # Unpaired, what makes items hard or easy would drown the difference.
    assert stats.ttest_ind(second[0], first[0]).pvalue > 3 * reference.pvalue


def test_the_variance_is_that_of_the_two_way_table():
    first, second = scores(np.random.default_rng(1), 6, 9, 1.0, 1.0, 0.5)
    d = second - first
    found = items.compare(first, second)
    rows, columns = d.mean(axis=1), d.mean(axis=0)
    of_seeds, of_items = 9 * rows.var(ddof=1), 6 * columns.var(ddof=1)
    rest = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / (5 * 8)
    total = of_seeds + of_items - rest
    assert found.mean == pytest.approx(d.mean())
    assert found.standard_error == pytest.approx(math.sqrt(total / 54))
    below = of_seeds**2 / 5 + of_items**2 / 8 + rest**2 / 40
    assert found.degrees == pytest.approx(total**2 / below)


def test_the_estimate_of_the_variance_is_that_of_the_model():
    rng, effects = np.random.default_rng(2), (0.6, 1.5, 1.0)
    found = [items.compare(*scores(rng, 6, 30, *effects)) for _ in range(REPEATS)]
    expected = 0.6**2 / 6 + 1.5**2 / 30 + 1.0 / 180
    assert np.mean([one.standard_error**2 for one in found]) == pytest.approx(expected, rel=0.06)
    assert np.var([one.mean for one in found]) == pytest.approx(expected, rel=0.16)


def test_verdicts_and_models_that_do_not_differ():
    first = np.random.default_rng(3).normal(size=(3, 20))
    same = items.compare(first, first)
    assert (same.mean, same.low, same.high, same.verdict) == (0, 0, 0, "not resolved")
    noise = np.random.default_rng(4).normal(0, 0.01, first.shape)
    assert items.compare(first, first + 1 + noise).verdict == "higher"
    assert items.compare(first, first - 1 + noise).verdict == "lower"


@pytest.mark.parametrize("shapes", [((2, 5), (3, 5)), ((2, 1), (2, 1)), ((5,), (5,))])
def test_tables_that_cannot_be_compared(shapes):
    with pytest.raises(ValueError, match=r"shapes=|items=1"):
        items.compare(*map(np.zeros, shapes))
