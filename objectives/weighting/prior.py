"""PRIOR: tokens that a model without the side context cannot guess."""

import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    stateless,
)
from objectives.weighting.samples import find_samples, sample_means, spread


def prior(alpha: float = 1.0) -> Weighting:
    """w = d * v / (mean of v over the sample), v = (1 - P_r)^alpha.

    P_r = exp(-l_r) is the probability that a reference gives to the target without the context
    that the model sees (an image's caption without the image, an answer without its prompt). PRIOR
    (arXiv 2505.08971). A sample is a document, by `batch["sample_ids"]`. The multipliers w / d of
    a sample have the mean 1, weighted by d.
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
        # A sample of tokens that are all certain has no mean to divide by: all count equally.
        surprise_BT = jnp.maximum(surprise_BT, 1e-6)
        value_BT = jnp.power(surprise_BT, alpha)
        samples = find_samples(batch)
        (mean_N,) = sample_means(samples, batch["weights"], value_BT)
        return multiply(batch, value_BT / spread(samples, mean_N)), state, {}

    return Weighting(stateless, weigh, references=("prior_nll",), batch_keys=("sample_ids",))
