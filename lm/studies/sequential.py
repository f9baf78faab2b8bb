"""Early stopping of paired comparisons with the error rate kept: looks after every seed.

After n of S planned seeds the statistic is Student's t of the first n paired differences. Bounds
c_n spend the error probability alpha over the looks as Lan and DeMets (1983), Biometrika 70,
659-663, do, in the manner of O'Brien and Fleming: hardly any of it early. They are exact for normal
differences, also with two or three seeds, where the usual bounds of normal statistics are not:
the statistics of consecutive seeds are a Markov chain under the null hypothesis, and its crossing
probabilities are integrated numerically, look by look. mean +- c_n se are the repeated intervals of
Jennison and Turnbull (1989), JRSS B 51, 305-361: with probability 1 - alpha they hold the true
difference at all looks at once, whatever decides when to stop. Pure functions of NumPy and scipy.

    Y  nodes of |t|, equally spaced in asinh |t|
    Q  nodes of a quadrature
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

# Below this conditional power a comparison is not going to be resolved, and from this share of the
# seeds on it may be said: earlier the observed trend is too uncertain.
FUTILITY = 0.1
FUTILITY_FROM = 0.5

_NODES, _QUADRATURE, _LARGEST = 600, 48, 1e8
# What is less than this is not spent at its look but later: there the bound is infinite.
_LEAST = 1e-8


def spending(fraction: float, alpha: float) -> float:
    """The error probability, both sides together, that is spent by a fraction of the seeds.

    4 - 4 Phi(z / sqrt(fraction)) with z the upper alpha/4 quantile of the normal distribution: on
    each side the function of Lan and DeMets (1983) for alpha/2 that resembles O'Brien and Fleming's
    bounds.
    """
    from scipy import special

    return float(4 * special.ndtr(special.ndtri(alpha / 4) / math.sqrt(fraction)))


@functools.lru_cache(maxsize=64)
def bounds(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The critical values of |t| at the looks.

    Args:
      looks: numbers of seeds, rising, at least 2; the last one is the number that is planned.
      alpha: probability, under the null hypothesis, that any look is beyond its bound.
    """
    found, spent, earlier_Y = [], 0.0, np.zeros(_NODES)
    for seeds in range(2, looks[-1] + 1):
        bound = math.inf
        if seeds in looks:
            left = spending(seeds / looks[-1], alpha) - spent
            if left > _LEAST:
                bound = _bound_with(left, earlier_Y, seeds)
                spent += left
            found.append(bound)
        earlier_Y = _crossed_earlier(earlier_Y, seeds, bound)
    return tuple(found)


def crossing(looks: Sequence[int], limits: Sequence[float]) -> list[float]:
    """The probability under the null hypothesis that a look up to each one is beyond its limit."""
    found, spent, earlier_Y = [], 0.0, np.zeros(_NODES)
    at = dict(zip(looks, limits, strict=True))
    for seeds in range(2, looks[-1] + 1):
        bound = at.get(seeds, math.inf)
        if seeds in at:
            spent += _tail(earlier_Y, seeds, bound)
            found.append(spent)
        earlier_Y = _crossed_earlier(earlier_Y, seeds, bound)
    return found


def study_bounds(seeds: int, comparisons: int, confidence: float = 0.95) -> dict[int, float]:
    """Number of seeds -> critical value, for looks after every seed of a study from the second on.

    alpha is (1 - confidence) / comparisons, as in lm.studies.comparison.
    """
    looks = tuple(range(2, seeds + 1))
    return dict(zip(looks, bounds(looks, (1 - confidence) / comparisons), strict=True))


def stopped_at(
    differences: Sequence[float], seeds: int, comparisons: int, confidence: float = 0.95
) -> int | None:
    """The number of seeds after which a comparison stops before its last seed.

    It stops as "worse" when the repeated interval is above 0, and as "not resolved" when from half
    of the seeds on the conditional power is below 10%. The bounds do not count on the latter
    (non-binding futility), so that it may be ignored. A comparison that is better goes on: what
    is gained is worth all its seeds.

    Args:
      differences: losses of the variant minus the baseline's, in the order of the planned seeds; no
        seed is left out.
      seeds: number of seeds that are planned.
      comparisons: number of variants that are compared with one baseline.
      confidence: of all intervals together.

    Returns:
      The first such number; None if the comparison goes on. The first differences alone decide, so
      that further ones change nothing.
    """
    if seeds < 3 or len(differences) < 2:
        return None
    at = study_bounds(seeds, comparisons, confidence)
    for n in range(2, min(len(differences), seeds - 1) + 1):
        known = np.asarray(differences[:n], np.float64)
        error = known.std(ddof=1) / math.sqrt(n)
        if math.isfinite(at[n]) and known.mean() - at[n] * error > 0:
            return n
        if n >= FUTILITY_FROM * seeds and conditional_power(known, seeds, at[seeds]) < FUTILITY:
            return n
    return None


def conditional_power(differences: Sequence[float], seeds: int, bound: float) -> float:
    """The probability that |t| of all seeds is beyond its bound, if the trend goes on.

    The differences of the seeds that are left are taken to be normal with the observed mean and
    standard deviation. Their sum A and their sum of squares B about their mean are independent;
    given A, |t| is beyond the bound where B is small enough, which chi-squared says.

    Args:
      differences: of the seeds that are known, at least two.
      seeds: number of seeds that are planned, more than are known.
      bound: critical value of |t| of all of them.
    """
    from scipy import special

    known = np.asarray(differences, np.float64)
    mean, deviation, left = known.mean(), known.std(ddof=1), seeds - known.size
    if not deviation:
        return float(mean != 0)
    nodes_Q, weights_Q = _gauss(400)
    z_Q = 8 * nodes_Q
    share_Q = 8 * weights_Q * np.exp(-(z_Q**2) / 2) / math.sqrt(2 * math.pi)
    added_Q = left * mean + math.sqrt(left) * deviation * z_Q
    total_Q = (known.sum() + added_Q) ** 2 / seeds
    room_Q = total_Q * (1 + (seeds - 1) / bound**2) - (known**2).sum() - added_Q**2 / left
    below_Q = np.maximum(room_Q, 0) / deviation**2
    reached_Q = special.chdtr(left - 1, below_Q) if left > 1 else (room_Q > 0).astype(float)
    return float(share_Q @ reached_Q)


@functools.lru_cache(maxsize=2)
def _gauss(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [Q] of Gauss and Legendre on (-1, 1)."""
    return np.polynomial.legendre.leggauss(count)


def _nodes() -> np.ndarray:
    """[Y] values of asinh |t|, from 0 to the largest |t|."""
    return np.linspace(0, math.asinh(_LARGEST), _NODES)


def _tails(earlier_Y: np.ndarray, seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(|t| > node) [Y], the same with no earlier look beyond its bound [Y], and what is without.

    The third, [Y - 1], is the share without an earlier crossing between two nodes.
    """
    from scipy import special

    plain_Y = 2 * special.stdtr(seeds - 1, -np.sinh(_nodes()))
    free_Y = 1 - (earlier_Y[1:] + earlier_Y[:-1]) / 2
    parts_Y = (plain_Y[:-1] - plain_Y[1:]) * free_Y
    last = plain_Y[-1] * (1 - earlier_Y[-1])
    first_Y = np.append(np.cumsum(parts_Y[::-1])[::-1] + last, last)
    return plain_Y, first_Y, free_Y


def _tail(earlier_Y: np.ndarray, seeds: int, bound: float) -> float:
    """P(|t| > bound, no earlier look was beyond its own)."""
    from scipy import special

    if bound >= _LARGEST:
        return 0.0
    plain_Y, first_Y, free_Y = _tails(earlier_Y, seeds)
    i = int(np.searchsorted(_nodes(), math.asinh(bound), side="right"))
    beyond = 2 * special.stdtr(seeds - 1, -bound) - plain_Y[i]
    return float(first_Y[i] + beyond * free_Y[i - 1])


def _bound_with(probability: float, earlier_Y: np.ndarray, seeds: int) -> float:
    """The bound of which `_tail` is a probability; infinite where the nodes do not reach it."""
    from scipy import special

    plain_Y, first_Y, free_Y = _tails(earlier_Y, seeds)
    i = int(np.searchsorted(-first_Y, -probability))
    if i == _NODES:
        return math.inf
    beyond = plain_Y[i] + (probability - first_Y[i]) / free_Y[i - 1]
    return -float(special.stdtrit(seeds - 1, beyond / 2))


def _crossed_earlier(earlier_Y: np.ndarray, seeds: int, bound: float) -> np.ndarray:
    """[Y] P(a look up to `seeds` was beyond its bound | |t| of seeds + 1 is the node).

    Under the null hypothesis the differences have no direction. Given t' of n + 1 of them, t of
    the first n is sqrt((n - 1) / (n + 1)) (t' - sin a) / cos a, where a in (-pi/2, pi/2) has a
    density proportional to cos(a)^(n - 2), so that sqrt(n - 1) tan a is Student's with n - 1
    degrees of freedom. |t| is within its bound where a is between `low` and `high`.

    Args:
      earlier_Y: the same of the look before, given |t| of `seeds`.
      seeds: n.
      bound: of the look at n.
    """
    from scipy import interpolate, special

    n, t_Y = seeds, np.sinh(_nodes())
    scale = math.sqrt((n - 1) / (n + 1))
    ratio_Y = np.minimum(t_Y / math.hypot(1, bound / scale), 1)
    turn = math.atan(bound / scale)
    low_Y = np.arcsin(ratio_Y) - turn
    high_Y = np.minimum(np.arcsin(ratio_Y) + turn, math.pi - np.arcsin(ratio_Y) - turn)
    high_Y = np.maximum(low_Y, high_Y)
    crossed_Y = special.stdtr(n - 1, math.sqrt(n - 1) * np.tan(low_Y))
    crossed_Y += special.stdtr(n - 1, -math.sqrt(n - 1) * np.tan(high_Y))
    if not earlier_Y.any():
        return np.clip(crossed_Y, 0, 1)
    # Even in t, therefore flat at 0.
    before = interpolate.CubicSpline(_nodes(), earlier_Y, bc_type=((1, 0.0), (2, 0.0)))
    nodes_Q, weights_Q = _gauss(_QUADRATURE)
    # Of many seeds the density is narrow: the nodes stand where it is.
    reach = math.atan(-special.stdtrit(n - 1, 1e-12) / math.sqrt(n - 1))
    low_Y = np.maximum(low_Y, -reach)
    high_Y = np.maximum(low_Y, np.minimum(high_Y, reach))
    half_Y = (high_Y - low_Y) / 2
    a_YQ = ((high_Y + low_Y) / 2)[:, None] + half_Y[:, None] * nodes_Q
    cosine_YQ = np.maximum(np.cos(a_YQ), 1e-12)
    t_YQ = scale * np.abs(t_Y[:, None] - np.sin(a_YQ)) / cosine_YQ
    constant = math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / math.sqrt(math.pi)
    density_YQ = constant * cosine_YQ ** (n - 2)
    known_YQ = np.clip(before(np.arcsinh(np.minimum(t_YQ, _LARGEST))), 0, 1)
    return np.clip(crossed_Y + half_Y * ((known_YQ * density_YQ) @ weights_Q), 0, 1)
