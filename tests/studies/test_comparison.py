"""Intervals, verdicts and numbers of seeds, on differences of which the truth is known."""

import math

import numpy as np
import pytest
import tiny
from scipy import stats

from lm.studies import comparison, power

REPEATS = 2000


def experiments(seeds, truth, seed=0, shared=0.3, own=0.02, repeats=REPEATS):
    """Losses [repeats, 1 + variants, seeds]: what a seed does to all, and what to each alone."""
    rng = np.random.default_rng(seed)
    truth = np.array([0.0, *truth])
    common = rng.normal(3.0, shared, (repeats, 1, seeds))
    return common + truth[None, :, None] + rng.normal(0, own, (repeats, len(truth), seeds))


def compared(losses, comparisons, **options):
    """The comparisons of one experiment [1 + variants, seeds]."""
    baseline, *variants = (dict(enumerate(row)) for row in losses.tolist())
    return [comparison.compare(baseline, v, comparisons, **options) for v in variants]


def within(share, expected, repeats=REPEATS):
    """Whether a share of so many repeats is as expected, to four standard errors."""
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_one_interval_covers_the_truth_at_the_stated_rate(seeds):
    for confidence in (0.8, 0.95):
        found = [
            compared(losses, 1, confidence=confidence)[0]
            for losses in experiments(seeds, [0.05], seed=seeds)
        ]
        covered = np.mean([c.low <= 0.05 <= c.high for c in found])
        assert within(covered, confidence)
    # The control: an interval of the normal distribution instead of Student's.
    z = stats.norm.isf(0.025)
    naive = np.mean([abs(c.difference - 0.05) <= z * c.standard_error for c in found])
    assert not within(naive, 0.95)


def test_all_intervals_together_cover_at_least_at_the_stated_rate():
    truth = [0.0, 0.01, -0.02, 0.05, 0.0]
    together, uncorrected = [], []
    for losses in experiments(3, truth):
        for comparisons, results in ((len(truth), together), (1, uncorrected)):
            found = compared(losses, comparisons)
            results.append(all(c.low <= t <= c.high for c, t in zip(found, truth, strict=True)))
    assert np.mean(together) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / REPEATS)
    assert np.mean(together) < 0.995  # It is no trivial interval.
    assert np.mean(uncorrected) < 0.9  # The control: the correction is what does it.


def test_a_against_a_is_not_resolved_at_the_stated_rate():
    found = [compared(losses, 1)[0] for losses in experiments(3, [0.0], seed=1)]
    verdicts = [c.verdict for c in found]
    assert within(verdicts.count("not resolved") / REPEATS, 0.95)
    assert verdicts.count("better") + verdicts.count("worse") > 0
    family = [
        all(c.verdict == "not resolved" for c in compared(losses, 3))
        for losses in experiments(3, [0.0] * 3, seed=2)
    ]
    assert np.mean(family) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / REPEATS)


def test_the_same_runs_twice_are_not_resolved():
    losses = {0: 3.1, 1: 3.2, 2: 3.0}
    found = comparison.compare(losses, dict(losses), 1)
    assert (found.verdict, found.difference, found.seeds_needed) == ("not resolved", 0.0, None)


def test_a_large_difference_is_resolved_on_its_side():
    better = compared(experiments(5, [-0.5], repeats=1)[0], 1)[0]
    worse = compared(experiments(5, [0.5], repeats=1)[0], 1)[0]
    assert (better.verdict, worse.verdict) == ("better", "worse")


def test_pairing_takes_out_what_the_seed_does_to_both():
    losses = experiments(5, [-0.1], repeats=200)
    paired = np.mean([compared(x, 1)[0].verdict == "better" for x in losses])
    rng = np.random.default_rng(0)
    shuffled = losses.copy()
    for x in shuffled:
        rng.shuffle(x[1])
    unpaired = np.mean([compared(x, 1)[0].verdict == "better" for x in shuffled])
    assert paired > 0.9
    assert unpaired < 0.2


@pytest.mark.parametrize(
    ("effect", "comparisons"), tiny.rows_mostly_slow([(2.0, 1), (1.0, 1), (1.0, 4), (0.5, 1)], (1,))
)
def test_the_number_of_seeds_has_the_stated_power(effect, comparisons):
    deviation = 0.02 * math.sqrt(2)  # of a paired difference
    seeds = power.seeds_to_resolve(-effect * deviation, deviation, comparisons)
    shares = []
    for count in (seeds, seeds - 1):
        losses = experiments(count, [-effect * deviation], seed=count)
        found = [compared(x, comparisons)[0].verdict == "better" for x in losses]
        shares.append(np.mean(found))
    slack = 4 * math.sqrt(0.8 * 0.2 / REPEATS)
    assert shares[0] > 0.8 - slack
    assert shares[1] < 0.8 + slack


def test_the_number_of_seeds_agrees_with_the_tables():
    # A half deviation, power 0.8, two-sided 0.05: 34 pairs in any table of the paired t-test.
    assert power.seeds_to_resolve(0.5, 1.0, 1) == 34
    assert power.seeds_to_resolve(1e-9, 1.0, 1) is None
    assert power.seeds_to_resolve(1.0, 1e-12, 1) == 2


def test_one_seed_resolves_nothing():
    found = comparison.compare({0: 3.0}, {0: 1.0}, 1)
    assert found.verdict == "not resolved"
    assert (found.low, found.high, found.seeds_needed) == (-math.inf, math.inf, None)


def test_only_seeds_of_both_count_and_only_finite_losses():
    baseline = {0: 3.0, 1: 3.2, 2: 3.4, 3: 3.1}
    found = comparison.compare(baseline, {1: 3.1, 2: math.nan, 3: 3.2, 9: 0.0}, 1)
    assert found.seeds == 2
    assert found.difference == pytest.approx(0.0, abs=1e-12)


def test_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6))
    (found,) = compared(np.array([a, b]), 1)
    reference = stats.ttest_rel(b, a).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), reference)
    assert comparison.summarise(a).standard_error == pytest.approx(stats.sem(a))
