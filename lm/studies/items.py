"""Paired comparisons over items as well as seeds: two models, scored on the same items.

The differences d[s, i] of seed s and item i are taken to be mean + seed + item + rest, with random
effects that are crossed: every seed answers every item. The mean over both has the variance
(MS_seed + MS_item - MS_rest) / (S I), with the mean squares of the two-way table, and an interval
of Student's t with Satterthwaite's degrees of freedom: the quasi-F of Clark (1973), Journal of
Verbal Learning and Verbal Behavior 12, 335-359, for experiments with samples of both subjects and
items. With one seed it is the paired analysis of items alone (Miller, arXiv 2411.00640, section 4),
which says nothing of other seeds. With two seeds the variance between seeds is hardly known: a
simulated interval at 95% covered 89%. Pure functions of NumPy and scipy.

    S  seeds (runs of a model)
    I  items of a task
"""

import math
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """The second model's scores minus the first one's.

    Attributes:
      mean: over seeds and items.
      standard_error: for other seeds and other items; with one seed for other items alone.
      degrees: of freedom, Satterthwaite's.
      low: lower end of the interval.
      high: its upper end.
      seeds: S.
      items: I.
    """

    mean: float
    standard_error: float
    degrees: float
    low: float
    high: float
    seeds: int
    items: int

    @property
    def verdict(self) -> str:
        """ "higher", "lower" or "not resolved": of the second model's scores."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not resolved"


def compare(
    first_SI: np.ndarray, second_SI: np.ndarray, comparisons: int = 1, confidence: float = 0.95
) -> Difference:
    """Compares two models on the same items.

    Args:
      first_SI: scores of the first model's runs; finite.
      second_SI: of the second model's, run by run with the same seeds.
      comparisons: number of intervals that are to hold at once (Bonferroni).
      confidence: of all of them together.

    Raises:
      ValueError: shapes that differ, or fewer than two items.
    """
    if first_SI.shape != second_SI.shape or first_SI.ndim != 2:
        raise ValueError(f"shapes={first_SI.shape}, {second_SI.shape} must be one [seeds, items]")
    seeds, items = first_SI.shape
    if items < 2:
        raise ValueError(f"items={items} must be at least 2")
    differences_SI = np.asarray(second_SI, np.float64) - np.asarray(first_SI, np.float64)
    mean = float(differences_SI.mean())
    variance, degrees = _variance(differences_SI, mean)
    error = math.sqrt(variance)
    half = _critical(degrees, comparisons, confidence) * error
    return Difference(mean, error, degrees, mean - half, mean + half, seeds, items)


def _variance(differences_SI: np.ndarray, mean: float) -> tuple[float, float]:
    """The variance of the mean and its degrees of freedom."""
    seeds, items = differences_SI.shape
    seed_S, item_I = differences_SI.mean(axis=1) - mean, differences_SI.mean(axis=0) - mean
    of_items = seeds * float(item_I @ item_I) / (items - 1)
    if seeds == 1:
        return of_items / items, items - 1
    of_seeds = items * float(seed_S @ seed_S) / (seeds - 1)
    rest_SI = differences_SI - mean - seed_S[:, None] - item_I
    of_rest = float((rest_SI**2).sum()) / ((seeds - 1) * (items - 1))
    # An estimated variance of seeds or of items below 0 is taken for 0.
    total = max(of_seeds + of_items - of_rest, of_seeds, of_items)
    spread = of_seeds**2 / (seeds - 1) + of_items**2 / (items - 1)
    spread += of_rest**2 / ((seeds - 1) * (items - 1))
    degrees = total**2 / spread if spread else items - 1
    return total / (seeds * items), max(degrees, 1.0)


def _critical(degrees: float, comparisons: int, confidence: float) -> float:
    from scipy import special

    return -float(special.stdtrit(degrees, (1 - confidence) / (2 * comparisons)))
