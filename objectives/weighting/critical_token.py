"""Critical tokens: where a model of right answers and a model of wrong ones disagree."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    stateless,
)


def critical_token(strength: float = 1.0) -> Weighting:
    """w = d * (1 - strength * p_c), p_c the `contrast_probability` of the target.

    The token score of cDPO (arXiv 2411.19943, and its released code), s = 1 - p_c, which is large
    for tokens that only the model of wrong answers expects. There it weights the rejected answers
    of a preference loss; here it is a weight like any other. strength is ours: 1 is the paper's
    score, 0 is cross-entropy.

    Needs the reference "contrast_probability": p_c, [B, T], which `launch.score --against` stores.

    Args:
      strength: of the contrast of right and wrong answers, in [0, 1]; 0 is off.

    Raises:
      ValueError: `strength` outside of [0, 1].
    """
    check_number("strength", strength, least=0, most=1)

    def weigh(statistics, batch, references, state, step):
        contrast_BT = reference(references, "contrast_probability")
        return multiply(batch, 1 - strength * contrast_BT), state, {}

    return Weighting(stateless, weigh, references=("contrast_probability",))


def contrast_probability(
    positive: jax.Array,
    negative: jax.Array,
    targets: jax.Array,
    *,
    alpha: float = 2.0,
    beta: float = 1.0,
) -> jax.Array:
    """p_c = softmax(alpha * z_positive - beta * z_negative) at the target.

    Args:
      positive: [..., V] logits of the model of right answers.
      negative: [..., V] logits of the model of wrong answers.
      targets: [...] integers in [0, V).
      alpha: 2 in the released code.
      beta: 1 in the released code.

    Returns:
      [...] probabilities.
    """
    p = jax.nn.softmax(alpha * positive - beta * negative, axis=-1)
    return jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0]
