"""Soft tokens: mixtures of embeddings that are drawn with Gumbel noise, and what they are worth.

K the most likely tokens at a place. From the released code of SofT-GRPO
(zz1358m/SofT-GRPO-master): a place of a chain of thought is no token but a mixture of the
embeddings of K tokens, and the policy gradient is that of the density of the noise that made the
mixture.
"""

import jax
import jax.numpy as jnp


def noisy_scores(
    log_p_K: jax.Array, noise_K: jax.Array, low: float = -1.5, high: float = 3.0
) -> jax.Array:
    """log p + g with Gumbel noise g, held within [low, high], [..., K].

    Args:
      log_p_K: log-probabilities of the K tokens under the policy that draws.
      noise_K: draws of the standard Gumbel distribution.
      low, high: bounds of the noise.
    """
    return log_p_K + jnp.clip(noise_K, low, high)


def mixture(scores_K: jax.Array, tau: float = 0.1) -> jax.Array:
    """softmax(scores / tau), the weights of the K embeddings; one-hot as tau goes to 0.

    Its largest entry is a draw of softmax(log p) (the Gumbel-max trick) up to the bounds of noise.

    Args:
      scores_K: of `noisy_scores`.
      tau: above 0.
    """
    return jax.nn.softmax(scores_K / tau, axis=-1)


def log_density(scores_K: jax.Array, log_p_K: jax.Array, least: float = -3.0) -> jax.Array:
    """Mean over entries with log p > least of -g - exp(-g), g = score - log p: [...].

    The logarithm of the standard Gumbel density of the noise that the policy must have had. It
    takes the place of log p of a token in the ratio of a policy gradient, and its gradient is in
    log p. 0 where no entry is above `least`.

    Args:
      scores_K: as they were drawn, a constant.
      log_p_K: log-probabilities of the same tokens under the policy that is trained.
      least: lowest log p that counts.
    """
    noise_K = jax.lax.stop_gradient(scores_K) - log_p_K
    counts_K = jax.lax.stop_gradient(log_p_K) > least
    # Selected first: exp of a large number is infinite, and its derivative NaN after a selection.
    noise_K = jnp.where(counts_K, noise_K, 0.0)
    density_K = jnp.where(counts_K, -noise_K - jnp.exp(-noise_K), 0.0)
    return jnp.sum(density_K, axis=-1) / jnp.maximum(jnp.sum(counts_K, axis=-1), 1)
