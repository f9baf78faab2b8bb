"""Weights of the drawn tokens, multiplied onto what the surrogate gives them; no gradient.

B rows, T tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.policy.answers import Answers, select
from objectives.policy.entropy import quantile
from objectives.weighting import selection
from objectives.weighting.samples import find_samples, scale_samples_to_unit


def icepop(log_k_BT: jax.Array, low: float = 0.5, high: float = 5.0) -> jax.Array:
    """k where low <= k <= high, else 0; k = p of the trained policy / p of the sampler.

    IcePop (arXiv 2510.18855). Both are of the same parameters: k differs from 1 by what the sampler
    computes in another way, as with fewer bits.

    Args:
      log_k_BT: log k.
      low, high: bounds of k.
    """
    k_BT = jnp.exp(lax.stop_gradient(log_k_BT))
    # As logarithms: exp(log(5)) need not be 5.
    inside_BT = (log_k_BT >= jnp.log(low) - 1e-6) & (log_k_BT <= jnp.log(high) + 1e-6)
    return jnp.where(inside_BT, k_BT, 0.0)


def group_divergence(
    answers: Answers, group_ids_BT: jax.Array, divergence_BT: jax.Array, alpha: float = 1.7
) -> jax.Array:
    """w = 1 + (alpha - 1) (x - min) / (max - min), x the divergence within the group: TW-GRPO.

    Released code: longmalongma/TW-GRPO. Minimum and maximum are over the drawn targets of the
    group, in all rows; where they are equal w = 1. A divergence that comes with the batch has no
    gradient, and so w has none; that of `objectives.policy.group_divergence` has one.

    Args:
      answers: of the whole batch.
      group_ids_BT: int32, the number of the prompt.
      divergence_BT: float32, of a token's predictions from those of its group at the same place.
      alpha: weight at the largest divergence; 1 is off.
    """
    samples = find_samples({"sample_ids": group_ids_BT, "weights": answers.weights_BT})
    x_BT = select(answers, divergence_BT)
    unit_BT = scale_samples_to_unit(samples, x_BT, epsilon=0.0)
    # 0 / 0 where all are equal.
    return 1 + (alpha - 1) * select(answers, jnp.where(jnp.isfinite(unit_BT), unit_BT, 0.0))


def by_advantage_and_entropy(
    answers: Answers, advantages_BT: jax.Array, entropy_BT: jax.Array, share: jax.Array | float
) -> jax.Array:
    """1 for the `share` of drawn targets with the largest |A| H, else 0: D3S.

    All that tie with the last one kept are kept. A share of 1 keeps all.
    """
    score_BT = jnp.abs(select(answers, advantages_BT)) * select(answers, entropy_BT)
    return keep_highest(answers, score_BT, share)


def keep_highest(answers: Answers, score_BT: jax.Array, share: jax.Array | float) -> jax.Array:
    """1 for the ceil(share * n) highest scores of the n drawn targets, and for ties, else 0.

    The share may be traced, as one that follows a schedule.
    """
    if isinstance(share, float | int):
        return selection.highest(score_BT, answers.live_BT, share).astype(jnp.float32)
    sorted_N = -jnp.sort(jnp.where(answers.live_BT, -score_BT, jnp.inf), axis=None)
    # Rounded down a little: 0.6 * 5 is above 3 in float32.
    wanted = jnp.ceil(share * answers.tokens - 1e-4).astype(jnp.int32)
    threshold = sorted_N[jnp.maximum(wanted - 1, 0)]
    return (answers.live_BT & (score_BT >= threshold)).astype(jnp.float32)


def linear_schedule(first: float, last: float, steps: int, step: jax.Array) -> jax.Array | float:
    """From `first` to `last` in `steps` steps, then `last`; `first` for ever where steps is 0."""
    if not steps:
        return first
    return first + (last - first) * jnp.minimum(step / steps, 1.0)


def by_entropy_quantile(answers: Answers, entropy_BT: jax.Array, share: float) -> jax.Array:
    """1 where the entropy is at least its quantile 1 - share over the batch, else 0.

    The `share` of drawn targets that are the most uncertain, after arXiv 2506.01939. A share of 1
    keeps all.
    """
    entropy_BT = select(answers, entropy_BT)
    kept_BT = entropy_BT >= quantile(answers, entropy_BT, 1 - share)
    return (answers.live_BT & kept_BT).astype(jnp.float32)


TOKEN_WEIGHTS = ("none", "icepop", "group_divergence", "advantage_entropy", "entropy_quantile")
