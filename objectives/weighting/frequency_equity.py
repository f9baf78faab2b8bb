"""What is frequent in the data counts less."""

import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    stateless,
)


def frequency_equity(eta: float = 1.0, gamma: float = 5.0) -> Weighting:
    """w = d * (eta + (1 - q)^gamma) / (eta + 1), q the likelihood of the token's kind in the data.

    The generalised focal loss of DatasetEquity (arXiv 2308.09878, and its released code), where q
    is the share of a sample's cluster of images. eta = 1 and gamma = 5 are its defaults. gamma = 0
    is cross-entropy. What q is for text is ours: the frequency of the token, the share of a cluster
    of documents, or, as `launch.score --name=likelihood` stores it, exp(-loss) of a trained run.

    Needs the reference "likelihood": q in [0, 1], [B, T].

    Args:
      eta: floor of the weight against its variable part, at least 0.
      gamma: exponent, at least 0.

    Raises:
      ValueError: a negative hyper-parameter.
    """
    check_number("eta", eta, least=0)
    check_number("gamma", gamma, least=0)

    def weigh(statistics, batch, references, state, step):
        likelihood_BT = reference(references, "likelihood")
        rare_BT = jnp.power(1 - likelihood_BT, gamma)
        return multiply(batch, (eta + rare_BT) / (eta + 1)), state, {}

    return Weighting(stateless, weigh, references=("likelihood",))
