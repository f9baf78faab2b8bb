"""Dynamic fine-tuning: each token counts as much as the model believes in it."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import Weighting, check_number, multiply, stateless


def dft(exponent: float = 1.0) -> Weighting:
    """w = d * p^exponent, p = exp(-l) detached.

    DFT (arXiv 2508.05629, and its released code) has exponent 1 and the mean over all tokens,
    normalisation `all`. Other exponents are ours; 0 is cross-entropy.

    Args:
      exponent: of p, at least 0; 0 is off.

    Raises:
      ValueError: a negative `exponent`.
    """
    check_number("exponent", exponent, least=0)

    def weigh(statistics, batch, references, state, step):
        nll_BT = jax.lax.stop_gradient(statistics.nll)
        return multiply(batch, jnp.exp(-exponent * nll_BT)), state, {}

    return Weighting(stateless, weigh, uses_statistics=True)
