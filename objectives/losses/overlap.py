"""Dice and Tversky losses: overlap of the predictions with the targets, over the whole batch."""

import jax
import jax.numpy as jnp

from objectives.losses.base import Loss
from objectives.weighting.base import check_number


def dice(alpha: float = 0.0, smooth: float = 1e-4, squared: bool = False) -> Loss:
    """1 - (2 sum w q + g) / (sum w q + sum w + g), q = (1 - p)^alpha p, p the label's probability.

    The self-adjusting Dice loss of arXiv 1911.02855 on the probability of the label,
    which is true (1) at every token: one class, one ratio over the whole accumulated batch. The
    gradient passes through (1 - p)^alpha. With weights w that average 1, g counts tokens.

    Departs from the authors' code, which sums one such ratio per class: with a vocabulary of
    classes most have no target in a batch.

    Args:
      alpha: exponent that takes easy tokens out; 0 is the soft Dice loss.
      smooth: g, added above and below, in tokens.
      squared: whether the denominator has sum w q^2 in place of sum w q (the truth's square is
        itself).

    Raises:
      ValueError: a negative number.
    """
    check_number("alpha", alpha, least=0)
    check_number("smooth", smooth, least=0)

    def reduce(p_BT, weights_BT):
        # The derivative of x^alpha is infinite at 0 for alpha < 1.
        q_BT = p_BT * jnp.power(jnp.maximum(1 - p_BT, 1e-7), alpha) if alpha else p_BT
        predicted = jnp.sum(weights_BT * (jnp.square(q_BT) if squared else q_BT))
        total = predicted + jnp.sum(weights_BT) + smooth
        return 1 - _ratio(2 * jnp.sum(weights_BT * q_BT) + smooth, total)

    return Loss(losses=_label_probability, reduce=reduce)


def tversky(alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0) -> Loss:
    """1 - (TP + g) / (TP + alpha FP + beta FN + g), TP = sum w p, FP = FN = sum w (1 - p).

    The Tversky loss (arXiv 1706.05721), counts summed over all tokens and all entries of
    the vocabulary: the probability 1 - p that a token's label misses lies falsely on the others,
    so that FP = FN and only alpha + beta acts.

    UNCONFIRMED: equation and defaults are from memory and from a worked number; how counts are
    taken over a vocabulary is ours. alpha = beta = 0.5 with FP = 0 would be `dice`.

    Args:
      alpha: price of false positives.
      beta: price of false negatives.
      smooth: g, added above and below, in tokens.

    Raises:
      ValueError: a negative number.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("smooth", smooth)):
        check_number(name, value, least=0)

    def reduce(p_BT, weights_BT):
        hit, missed = jnp.sum(weights_BT * p_BT), jnp.sum(weights_BT * (1 - p_BT))
        return 1 - tversky_index(hit, missed, missed, alpha, beta, smooth)

    return Loss(losses=_label_probability, reduce=reduce)


def tversky_index(
    true_positive: jax.Array,
    false_positive: jax.Array,
    false_negative: jax.Array,
    alpha: float,
    beta: float,
    smooth: float,
) -> jax.Array:
    """(TP + g) / (TP + alpha FP + beta FN + g), and 1 for 0 / 0."""
    hit = true_positive + smooth
    return _ratio(hit, hit + alpha * false_positive + beta * false_negative)


def _label_probability(inputs, statistics):
    return jnp.exp(statistics.log_probability)


def _ratio(a, b):
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1.0), 1.0)
