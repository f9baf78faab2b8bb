"""Looks after every seed: published bounds, error rates, power, and lasting decisions."""

import math

import numpy as np
import pytest
from scipy import special, stats

from lm.studies import power, sequential

REPEATS = 100_000


def statistics(seeds, truth=0.0, repeats=REPEATS):
    """Student's t of the first 2, 3, ... seeds [repeats, seeds - 1]."""
    x = np.random.default_rng(seeds).normal(truth, 1, (repeats, seeds))
    n = np.arange(1, seeds + 1)
    mean = x.cumsum(axis=1) / n
    squares = (x**2).cumsum(axis=1) - n * mean**2
    return (mean * np.sqrt(n))[:, 1:] / np.sqrt(squares[:, 1:] / (n - 1)[1:])


def agrees(count, repeats, rate):
    return stats.binomtest(int(count), repeats, rate).pvalue > 1e-4


def as_student(z, looks):
    """Bounds of t with the tail probabilities of bounds of normal statistics."""
    return [float(-special.stdtrit(n - 1, special.ndtr(-x))) for n, x in zip(looks, z, strict=True)]


# Where seeds are many, t has the joint distribution of normal statistics. Five equal groups,
# two-sided 0.05, from the tables of Jennison and Turnbull (2000), Group Sequential Methods.
MANY = tuple(range(60, 301, 60))
PUBLISHED = {
    "Pocock": [2.413] * 5,
    "O'Brien and Fleming": [2.040 * math.sqrt(5 / k) for k in (1, 2, 3, 4, 5)],
    "Lan and DeMets": [4.877, 3.357, 2.680, 2.290, 2.031],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bounds_have_the_error_rate(name):
    found = sequential.crossing(MANY, as_student(PUBLISHED[name], MANY))
    assert found[-1] == pytest.approx(0.05, abs=5e-4)


def test_bounds_without_a_correction_have_the_published_inflation():
    # Armitage, McPherson and Rowe (1969): five looks at 0.05 are an error rate of 0.142.
    found = sequential.crossing(MANY, as_student([1.96] * 5, MANY))
    assert found[-1] == pytest.approx(0.142, abs=1e-3)


def test_the_bounds_are_those_of_the_published_spending():
    found = sequential.bounds(MANY, 0.05)
    z = [-special.ndtri(special.stdtr(n - 1, -c)) for n, c in zip(MANY, found, strict=True)]
    np.testing.assert_allclose(z, PUBLISHED["Lan and DeMets"], atol=3e-3)


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (5, 1), (8, 3), (12, 6)])
def test_the_error_is_spent_as_stated_at_every_look(seeds, comparisons):
    alpha = 0.05 / comparisons
    bounds = sequential.study_bounds(seeds, comparisons)
    assert list(bounds) == list(range(2, seeds + 1))
    crossed = np.abs(statistics(seeds)) > np.array(list(bounds.values()))
    shares = np.logical_or.accumulate(crossed, axis=1).sum(axis=0)
    for n, count in zip(bounds, shares, strict=True):
        rate = sequential.spending(n / seeds, alpha)
        # What is hardly anything is spent at a later look.
        assert agrees(count, REPEATS, rate if math.isfinite(bounds[n]) else 0.0)
    assert sequential.spending(1.0, alpha) == pytest.approx(alpha)
    spent = sequential.crossing(tuple(bounds), tuple(bounds.values()))
    assert spent[-1] == pytest.approx(alpha, rel=1e-6)


def test_neither_the_fixed_value_nor_normal_bounds_keep_the_error_rate():
    t = np.abs(statistics(5))
    fixed = [stats.t.isf(0.025, n - 1) for n in range(2, 6)]
    assert (t > fixed).any(axis=1).mean() > 0.1
    # The control: what the bounds of normal statistics would do to so few seeds.
    normal = [-special.ndtri(sequential.spending(n / 5, 0.05) / 2) for n in range(2, 6)]
    assert (t > normal).any(axis=1).mean() > 0.06


def test_the_probability_of_crossing_is_that_of_a_simulation():
    limits = [9.0, 4.0, 3.0, math.inf, 2.5]
    crossed = np.logical_or.accumulate(np.abs(statistics(6)) > limits, axis=1).sum(axis=0)
    for count, rate in zip(crossed, sequential.crossing(range(2, 7), limits), strict=True):
        assert agrees(count, REPEATS, rate)


def verdicts(seeds, comparisons, truth, repeats, stops=True):
    """Verdicts of studies that stop, by the repeated interval, and the seeds that they took."""
    x = np.random.default_rng(7).normal(truth, 1, (repeats, seeds))
    bounds = sequential.study_bounds(seeds, comparisons)
    found, taken = [], []
    for row in x.tolist():
        at = (sequential.stopped_at(row, seeds, comparisons) if stops else None) or seeds
        half = bounds[at] * stats.sem(row[:at])
        mean = sum(row[:at]) / at
        found.append("worse" if mean > half else "better" if mean < -half else "not resolved")
        taken.append(at)
    return found, np.mean(taken)


def test_a_study_that_stops_has_at_most_the_stated_error_rate():
    found, taken = verdicts(8, 1, 0.0, 2000)
    wrong = 2000 - found.count("not resolved")
    assert stats.binomtest(wrong, 2000, 0.05, alternative="greater").pvalue > 1e-4
    assert wrong > 40  # It does say something.
    assert taken < 6  # Most of what is nothing ends early.


@pytest.mark.parametrize("truth", [1.2, -1.2])
def test_the_power_is_near_that_of_all_seeds_without_looks(truth):
    fixed = power.power(truth, 1.0, 8, 1)
    found, taken = verdicts(8, 1, truth, 1000)
    share = found.count("worse" if truth > 0 else "better") / 1000
    assert fixed - 0.11 < share < fixed + 0.04
    assert found.count("better" if truth > 0 else "worse") <= 2
    assert taken < 8 if truth > 0 else taken > 7


def test_a_difference_that_is_large_stops_when_it_is_worse_and_not_when_it_is_better():
    worse = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0]
    assert sequential.stopped_at(worse, 6, 2) == 3
    assert sequential.stopped_at([-x for x in worse], 6, 2) is None


def test_what_is_out_of_reach_stops_from_half_of_the_seeds_on():
    nothing = [1.0, -1.1, 0.9, -0.8, 1.2, -1.0]
    assert sequential.stopped_at(nothing[:2], 6, 1) is None
    assert sequential.stopped_at(nothing, 6, 1) in (3, 4)
    assert sequential.stopped_at([0.0] * 6, 6, 1) == 3


def test_later_seeds_change_no_decision():
    rng = np.random.default_rng(5)
    for truth in (0.0, 1.0, 3.0):
        for row in rng.normal(truth, 1, (20, 8)).tolist():
            at = [sequential.stopped_at(row[:n], 8, 2) for n in range(9)]
            first = next((one for one in at if one), None)
            assert all(one == (first if first and n >= first else None) for n, one in enumerate(at))


@pytest.mark.parametrize(("known", "seeds"), [([0.5, 1.4, 0.2], 4), ([0.5, 1.4, 0.2], 8)])
def test_conditional_power_is_that_of_a_simulation(known, seeds):
    bound, repeats = 2.6, 40_000
    mean, deviation = np.mean(known), np.std(known, ddof=1)
    new = np.random.default_rng(0).normal(mean, deviation, (repeats, seeds - 3))
    x = np.concatenate([np.broadcast_to(known, (repeats, 3)), new], axis=1)
    resolved = np.abs(x.mean(axis=1)) > bound * stats.sem(x, axis=1)
    stated = sequential.conditional_power(known, seeds, bound)
    assert resolved.mean() == pytest.approx(stated, abs=0.012)
    assert 0.02 < stated < 0.98
    assert sequential.conditional_power([1.0, 1.0], seeds, bound) == 1
    assert sequential.conditional_power([0.0, 0.0], seeds, bound) == 0


def test_two_seeds_have_no_look_in_between():
    assert sequential.stopped_at([5.0, 5.01], 2, 1) is None
    assert sequential.stopped_at([5.0], 6, 1) is None
