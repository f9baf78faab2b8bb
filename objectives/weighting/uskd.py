"""The target term of universal self-knowledge distillation."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import Weighting, check_number, multiply, stateless


def uskd(strength: float = 1.0) -> Weighting:
    """w = d * (1 + strength * (p^2 - mean p^2)), p = exp(-l) detached, the mean over the batch.

    USKD (arXiv 2303.13005, and its released code) has strength 1, for images; other strengths are
    ours, and 0 is cross-entropy. The mean is weighted by d, so that sum(w) = sum(d). The
    non-target term is not here.

    Args:
      strength: of p^2 minus its mean, in [0, 1]; 0 is off.

    Raises:
      ValueError: `strength` outside of [0, 1], where weights could be negative.
    """
    check_number("strength", strength, least=0, most=1)

    def weigh(statistics, batch, references, state, step):
        square_BT = jnp.exp(-2 * jax.lax.stop_gradient(statistics.nll))
        mean = jnp.sum(multiply(batch, square_BT)) / jnp.sum(batch["weights"])
        return multiply(batch, 1 + strength * (square_BT - mean)), state, {}

    return Weighting(stateless, weigh, uses_statistics=True)
