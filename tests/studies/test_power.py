"""Power of paired comparisons, against scipy's distributions, tables and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lm.studies import comparison, power

REPEATS = 4000


def simulated(difference, deviation, seeds, comparisons, confidence, repeats=REPEATS):
    """The share of experiments of which the interval excludes 0 on the side of the difference."""
    rng = np.random.default_rng(seeds)
    paired = rng.normal(difference, deviation, (repeats, seeds))
    half = stats.t.isf((1 - confidence) / (2 * comparisons), seeds - 1)
    low = paired.mean(axis=1) - half * stats.sem(paired, axis=1)
    return np.mean(low > 0)


@pytest.mark.parametrize("seeds", [2, 3, 5, 12, 60])
@pytest.mark.parametrize(("comparisons", "confidence"), [(1, 0.95), (6, 0.95), (1, 0.8)])
def test_power_is_the_mass_of_the_noncentral_t(seeds, comparisons, confidence):
    for effect in (0.1, 0.7, 1.5, 4.0):
        found = power.power(-effect * 0.03, 0.03, seeds, comparisons, confidence)
        limit = stats.t.isf((1 - confidence) / (2 * comparisons), seeds - 1)
        exact = stats.nct.sf(limit, seeds - 1, math.sqrt(seeds) * effect)
        assert found == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize(
    ("effect", "seeds", "comparisons"), [(2.0, 4, 1), (1.0, 8, 3), (0.6, 20, 1)]
)
def test_power_is_the_rate_at_which_a_difference_is_resolved(effect, seeds, comparisons):
    stated = power.power(effect * 0.02, 0.02, seeds, comparisons)
    share = simulated(effect * 0.02, 0.02, seeds, comparisons, 0.95)
    assert stats.binomtest(round(share * REPEATS), REPEATS, stated).pvalue > 1e-4
    # The control: the power of a normal distribution is not that of so few seeds.
    normal = stats.norm.sf(stats.norm.isf(0.025 / comparisons) - effect * math.sqrt(seeds))
    assert stats.binomtest(round(share * REPEATS), REPEATS, normal).pvalue < 1e-4


def test_the_published_numbers_of_pairs():
    # Cohen's d of 0.2, 0.5 and 0.8 in a paired two-sided t-test at 0.05 and power 0.8.
    found = [power.seeds_to_resolve(effect, 1.0, 1) for effect in (0.2, 0.5, 0.8)]
    assert found == [199, 34, 15]


@given(st.floats(0.05, 20), st.floats(1e-4, 10), st.integers(1, 12), st.sampled_from([0.8, 0.95]))
def test_the_seeds_are_the_fewest_with_the_power(effect, deviation, comparisons, confidence):
    seeds = power.seeds_to_resolve(effect * deviation, deviation, comparisons, confidence)
    enough = power.power(effect * deviation, deviation, seeds, comparisons, confidence)
    fewer = power.power(effect * deviation, deviation, seeds - 1, comparisons, confidence)
    assert fewer < 0.8 <= enough


@given(st.integers(2, 200), st.floats(1e-4, 10), st.integers(1, 12), st.floats(0.3, 0.95))
def test_the_smallest_difference_has_the_power(seeds, deviation, comparisons, target):
    found = power.smallest_difference(deviation, seeds, comparisons, target=target)
    assert power.power(found, deviation, seeds, comparisons) == pytest.approx(target, abs=1e-6)


def test_what_nothing_resolves():
    assert power.power(1.0, 0.1, 1, 1) == 0
    assert power.smallest_difference(0.1, 1, 1) == math.inf
    assert power.seeds_to_resolve(0.0, 1.0, 1) is None
    assert power.seeds_to_resolve(math.nan, 1.0, 1) is None
    assert power.power(1e6, 1.0, 3, 1) == 1


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_true_deviation_is_below_its_limit_at_the_stated_rate(seeds):
    rng = np.random.default_rng(seeds)
    found = rng.normal(0, 0.5, (REPEATS, seeds)).std(axis=1, ddof=1)
    below = sum(power.deviation_limit(float(s), seeds) > 0.5 for s in found)
    assert stats.binomtest(below, REPEATS, 0.8).pvalue > 1e-4
    assert np.mean(found < 0.5) > 0.54  # The estimate itself is too small more often than not.


def test_a_comparison_states_the_seeds_of_its_own_difference():
    rng = np.random.default_rng(3)
    base, other = rng.normal(3, 0.1, 6), rng.normal(3.05, 0.1, 6)
    found = comparison.compare(dict(enumerate(base)), dict(enumerate(other)), 4)
    deviation = float(np.std(other - base, ddof=1))
    assert found.seeds_needed == power.seeds_to_resolve(found.difference, deviation, 4)
