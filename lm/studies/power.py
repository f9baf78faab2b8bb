"""What a paired comparison over seeds can resolve: power, seeds needed, the smallest difference.

The test is that of lm.studies.comparison: Student's t of S paired differences, two-sided, at the
level (1 - confidence) / comparisons (Bonferroni). For normal differences the ratio of mean to
standard error has the noncentral t distribution with S - 1 degrees of freedom and noncentrality
sqrt(S) |difference| / deviation. A difference counts as resolved on its own side only: what lies
beyond the critical value of the other side would be a wrong verdict. Pure functions of scipy.

    S  seeds of a comparison
"""

import math
from typing import NamedTuple


class Deviation(NamedTuple):
    """The standard deviation of paired differences, estimated from a pilot.

    Attributes:
      value: s, with S - 1 in it.
      upper: upper limit of its one-sided interval, see `deviation_limit`.
      seeds: S.
    """

    value: float
    upper: float
    seeds: int


def critical(seeds: int, comparisons: int, confidence: float = 0.95) -> float:
    """Student's t beyond which lies half of the error probability of one interval."""
    from scipy import special

    return -float(special.stdtrit(seeds - 1, (1 - confidence) / (2 * comparisons)))


def power(
    difference: float, deviation: float, seeds: int, comparisons: int, confidence: float = 0.95
) -> float:
    """The probability that a true difference is resolved, on its own side.

    Args:
      difference: the true mean of the paired differences; its sign does not matter.
      deviation: their true standard deviation, positive, in the same unit.
      seeds: S; with one seed nothing is resolved.
      comparisons: number of variants that are compared with one baseline.
      confidence: of all intervals together.
    """
    from scipy import special

    if seeds < 2:
        return 0.0
    shift = math.sqrt(seeds) * abs(difference) / deviation
    missed = special.nctdtr(seeds - 1, shift, critical(seeds, comparisons, confidence))
    # scipy's noncentral t is NaN for large noncentralities; there the power is 1.
    return 1.0 if math.isnan(missed) else float(1 - missed)


def seeds_to_resolve(
    difference: float,
    deviation: float,
    comparisons: int,
    confidence: float = 0.95,
    target: float = 0.8,
    most: int = 100_000,
) -> int | None:
    """The fewest seeds with a power of `target`: their interval excludes 0 on the right side.

    The true difference and deviation are not known: put in as observed at a few seeds, they make
    this a rough guide, and where the observed difference is far too large, a flattering one.

    Returns:
      None for a difference of 0, which no number resolves, or where it would be above `most`.
    """
    if not difference or not math.isfinite(difference) or not math.isfinite(deviation):
        return None
    if not deviation:
        return 2

    def resolves(seeds: int) -> bool:
        return power(difference, deviation, seeds, comparisons, confidence) >= target

    low, high = 1, 2
    while not resolves(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if resolves(middle) else (middle, high)
    return high


def smallest_difference(
    deviation: float, seeds: int, comparisons: int, confidence: float = 0.95, target: float = 0.8
) -> float:
    """The smallest true difference that `seeds` seeds resolve with a power of `target`.

    Returns:
      Its size, in the unit of `deviation`; infinite for one seed.
    """
    from scipy import optimize

    if seeds < 2:
        return math.inf

    def excess(ratio: float) -> float:
        return power(ratio, 1.0, seeds, comparisons, confidence) - target

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return deviation * float(optimize.brentq(excess, 0.0, high, xtol=1e-12 * high))


def deviation_limit(value: float, seeds: int, confidence: float = 0.8) -> float:
    """One-sided upper confidence limit of a standard deviation, from its estimate.

    value sqrt((S - 1) / q) with q the (1 - confidence) quantile of chi-squared with S - 1 degrees
    of freedom: the true deviation of normal differences is below it with probability `confidence`.
    To plan with this limit instead of the estimate is the advice of Browne (1995), Statistics in
    Medicine 14, 1933-1940: the estimate itself is too small in more than half of all small pilots.
    """
    from scipy import special

    return value * math.sqrt((seeds - 1) / special.chdtri(seeds - 1, confidence))
