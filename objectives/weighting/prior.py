"""PRIOR: tokens that a model without the side context cannot guess."""

import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    row_mean,
    stateless,
)


def prior(alpha: float = 1.0) -> Weighting:
    """w = d * v / (mean of v over the row), v = (1 - P_r)^alpha.

    P_r = exp(-l_r) is the probability that a reference gives to the target without the context
    that the model sees (an image's caption without the image, an answer without its prompt). PRIOR
    (arXiv 2505.08971). The weights of a row have the mean 1, the mean being weighted by d.
    Unconfirmed: whether the paper divides by the length of each caption once more; that is
    normalisation `sequence`, while `kept` is the mean over the tokens of the batch. alpha = 0 or a
    constant P_r is cross-entropy.

    Needs the reference "prior_nll": the losses l_r, [B, T], nats. A second model or the moving
    average sees the same context as the model; `launch.score --without_context` stores losses
    without the prompt.

    Args:
      alpha: exponent, at least 0; 1 in the paper.

    Raises:
      ValueError: a negative `alpha`.
    """
    check_number("alpha", alpha, least=0)

    def weigh(statistics, batch, references, state, step):
        surprise_BT = -jnp.expm1(-reference(references, "prior_nll"))
        # A row of tokens that are all certain has no mean to divide by: all count equally.
        surprise_BT = jnp.maximum(surprise_BT, 1e-6)
        value_BT = jnp.power(surprise_BT, alpha)
        return multiply(batch, value_BT / row_mean(value_BT, batch["weights"])), state, {}

    return Weighting(stateless, weigh, references=("prior_nll",))
