"""What paired runs say of a difference: intervals, verdicts, and how many seeds would resolve it.

Losses are those of variants of one experiment. Runs of one seed have the same initialisation and
the same order of data, so that the difference to the baseline is taken seed by seed, and what the
seed does to both cancels. Pure functions of NumPy and scipy.

    S  seeds that both variants have
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.studies.power import critical, seeds_to_resolve


class Summary(NamedTuple):
    """Mean over seeds and its standard error, s / sqrt(S) with S - 1 in s; NaN for one seed."""

    mean: float
    standard_error: float
    seeds: int


class Comparison(NamedTuple):
    """A variant against the baseline.

    Attributes:
      difference: mean of the variant's losses minus the baseline's, over the seeds of both.
      standard_error: of the difference.
      low: lower end of the simultaneous interval.
      high: its upper end.
      seeds: number of seeds that both have.
      verdict: "better" (the whole interval is below 0), "worse" (above), or "not resolved".
      seeds_needed: seeds that would resolve a difference as large as this one, see
        `lm.studies.power`; None where it cannot be said.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    seeds: int
    verdict: str
    seeds_needed: int | None


def summarise(losses: Sequence[float]) -> Summary:
    """Mean and standard error of [S] losses; NaN without any."""
    losses = np.asarray(losses, np.float64)
    mean = float(losses.mean()) if losses.size else math.nan
    return Summary(mean, _standard_error(losses), losses.size)


def paired(baseline: Mapping[int, float], variant: Mapping[int, float]) -> np.ndarray:
    """[S] losses of a variant minus the baseline's, of the seeds that have finite ones of both."""
    found = [variant[seed] - baseline[seed] for seed in sorted(baseline.keys() & variant.keys())]
    differences = np.array(found, np.float64)
    return differences[np.isfinite(differences)]


def compare(
    baseline: Mapping[int, float],
    variant: Mapping[int, float],
    comparisons: int,
    confidence: float = 0.95,
    power: float = 0.8,
    bound: float | None = None,
) -> Comparison:
    """Compares the losses (by seed) of a variant with those of the baseline.

    The interval is Student's of the S paired differences, mean +- t se with S - 1 degrees of
    freedom, at the level 1 - (1 - confidence) / comparisons (Bonferroni): with probability at least
    `confidence` all intervals of an ablation hold their true differences at once, whatever the
    dependence between them; variants that share a baseline are dependent. It takes differences to
    be normal, which few seeds cannot check.

    Args:
      baseline: seed -> loss.
      variant: seed -> loss. Losses that are not finite leave their seed out.
      comparisons: number of variants that are compared with this baseline, the baseline not among
        them.
      confidence: of all intervals together.
      power: see `seeds_to_resolve` of lm.studies.power.
      bound: t to take instead of Student's quantile, as of lm.studies.sequential; may be infinite.
    """
    differences = paired(baseline, variant)
    mean, error, count = summarise(differences)
    if count < 2:
        return Comparison(mean, error, -math.inf, math.inf, count, "not resolved", None)
    if bound is None:
        bound = critical(count, comparisons, confidence)
    # An infinite bound makes an infinite interval, also where the runs do not differ.
    half = bound * error if math.isfinite(bound) else math.inf
    low, high = mean - half, mean + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "not resolved"
    needed = seeds_to_resolve(mean, error * math.sqrt(count), comparisons, confidence, power)
    return Comparison(mean, error, low, high, count, verdict, needed)


def _standard_error(values: np.ndarray) -> float:
    if values.size < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(values.size))
