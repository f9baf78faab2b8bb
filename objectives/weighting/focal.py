"""Focal loss: easy tokens count less."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import Weighting, check_number, multiply, stateless


def focal(gamma: float = 2.0, detach: bool = False) -> Weighting:
    """w = d * (1 - p)^gamma, p = exp(-l); the gradient passes through the weight unless detached.

    Focal loss (arXiv 1708.02002): the mean over all tokens, normalisation `all`. Under `kept` the
    denominator sum(w) is a constant for the gradient. gamma = 0 is cross-entropy.

    Args:
      gamma: focusing exponent, at least 0.
      detach: whether the weight is a constant for the gradient; it is not in the paper.

    Raises:
      ValueError: a negative `gamma`.
    """
    check_number("gamma", gamma, least=0)

    def weigh(statistics, batch, references, state, step):
        # Selected before any arithmetic: the derivative at a NaN would be 0 * NaN.
        nll_BT = jnp.where(batch["weights"] != 0, statistics.nll, 1.0)
        nll_BT = jax.lax.stop_gradient(nll_BT) if detach else nll_BT
        # The derivative of x^gamma is infinite at 0 for gamma < 1.
        doubt_BT = jnp.maximum(-jnp.expm1(-nll_BT), 1e-7)
        return multiply(batch, jnp.power(doubt_BT, gamma)), state, {}

    return Weighting(stateless, weigh, uses_statistics=True, detached=detach)
