"""What is known of tokens when they are drawn, for objectives that need it later.

B rows, G rows of a group, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The bound of TW-GRPO's differences of log-probabilities, +-11.
_LARGEST_DIFFERENCE = 11.0

# (entropies [B], nats) -> factors [B] of the temperature.
Temper = Callable[[jax.Array], jax.Array]


class Measured(NamedTuple):
    """Of one drawn token a row; float32, 0 where a row had ended before.

    Attributes:
      log_probability_B: log p of the token under the distribution that it was drawn from, nats.
      entropy_B: of softmax(logits / temperature), nats.
      divergence_B: of the row's group, see `group_divergence`; 0 where it was not asked for.
      temperature_B: that the logits were divided by where the token was drawn.
    """

    log_probability_B: jax.Array
    entropy_B: jax.Array
    divergence_B: jax.Array
    temperature_B: jax.Array


def measure(
    logits_BV: jax.Array,
    token_B: jax.Array,
    ended_B: jax.Array,
    temperature: float,
    group: int,
    temper: Temper | None = None,
) -> Measured:
    """Log-probability and entropy under softmax(logits / temperature) over the whole vocabulary.

    What top-k and top-p would leave out counts. With `temper` the log-probability is that at the
    token's own temperature.

    Args:
      logits_BV: float32, of the token that is drawn.
      token_B: the token.
      ended_B: whether a row had ended before it.
      temperature: 0 stands for greedy decoding, and the distribution is then softmax(logits).
      group: G, rows of a group, which stand next to each other, for their divergence; 0 leaves it.
      temper: see `temperatures`.
    """
    temperature = temperature or 1.0
    log_p_BV = jax.nn.log_softmax(logits_BV / temperature, axis=-1)
    entropy_B = _entropies(log_p_BV)
    own_BV, temperature_B = log_p_BV, jnp.full_like(entropy_B, temperature)
    if temper:
        temperature_B = temperatures(logits_BV, temperature, temper)
        own_BV = jax.nn.log_softmax(logits_BV / temperature_B[:, None], axis=-1)
    of_token_B = jnp.take_along_axis(own_BV, token_B[:, None], axis=-1)[:, 0]
    divergence_B = jnp.zeros_like(entropy_B)
    if group:
        divergence_B = jnp.repeat(group_divergence(log_p_BV, ended_B, group), group)
    found = of_token_B, entropy_B, divergence_B, temperature_B
    return Measured(*(jnp.where(ended_B, 0, x) for x in found))


def temperatures(logits_BV: jax.Array, temperature: float, temper: Temper) -> jax.Array:
    """temperature * temper(H), H the entropy of softmax(logits / temperature), [B]."""
    log_p_BV = jax.nn.log_softmax(logits_BV / temperature, axis=-1)
    return temperature * temper(_entropies(log_p_BV))


def _entropies(log_p_BV: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(log_p_BV) * log_p_BV, axis=-1)


def group_divergence(log_p_BV: jax.Array, ended_B: jax.Array, group: int) -> jax.Array:
    """How much the members of each group disagree on the next token, [B / G] float32, nats.

      mean over the group of sum_v (exp(D) - D - 1),  D = clip(mean log p - log p, -11, 11)

    TW-GRPO's token_kl, as its released code computes it: the mean is that of log-probabilities, and
    a member that has ended counts as a uniform distribution.

    Args:
      log_p_BV: log-probabilities; the rows of a group stand next to each other.
      ended_B: whether a row has ended.
      group: G, rows of a group.
    """
    size = log_p_BV.shape[-1]
    log_p_BV = jnp.where(ended_B[:, None], -jnp.log(float(size)), log_p_BV)
    log_p_NGV = log_p_BV.reshape(-1, group, size)
    mean_N1V = jnp.mean(log_p_NGV, axis=1, keepdims=True)
    most = _LARGEST_DIFFERENCE
    difference_NGV = jnp.clip(mean_N1V - log_p_NGV, -most, most)
    # exp(D) - D - 1 without the loss of digits near 0.
    return jnp.mean(jnp.sum(jnp.expm1(difference_NGV) - difference_NGV, axis=-1), axis=1)
