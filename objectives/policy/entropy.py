"""How uncertain a token was among those of its batch.

B rows, T tokens. Entropies are of the distribution that was drawn from.
"""

import jax
import jax.numpy as jnp

from objectives.policy.answers import Answers, select

# Below it a float32 entropy cannot be told from 0, whose logarithm would be infinite.
_LEAST = 1e-8


def quantile(answers: Answers, values_BT: jax.Array, share: float) -> jax.Array:
    """The value at place round(share * (n - 1)) of the n sorted values of drawn targets, a scalar.

    0 for a batch without a target.
    """
    sorted_N = jnp.sort(jnp.where(answers.live_BT, values_BT, jnp.inf), axis=None)
    place = jnp.round(share * jnp.maximum(answers.tokens - 1, 0)).astype(jnp.int32)
    return jnp.where(answers.tokens > 0, sorted_N[place], 0.0)


def relative_entropy(
    answers: Answers, entropy_BT: jax.Array, share: float = 0.8, released: bool = False
) -> jax.Array:
    """HAPO's scale h of the log entropy in [-1, 1], over all drawn targets of the batch, [B, T].

    e = log H, h = (e - pivot) / rms(e - pivot) with the pivot at the quantile `share` of e; then
    positive h are divided by the largest one, and others by the size of the smallest one.

    The released code (starriver030515/HAPO) divides the others by the smallest one, which is
    negative, so that no h is below 0 and the branches for h below 0 are not reached but at 0. The
    sign intended is INFERRED.

    Args:
      answers: of the whole batch.
      entropy_BT: H, nats.
      share: in [0, 1].
      released: the form of the released code.
    """
    log_BT = jnp.log(jnp.maximum(select(answers, entropy_BT), _LEAST))
    apart_BT = select(answers, log_BT - quantile(answers, log_BT, share))
    square = jnp.sum(jnp.square(apart_BT)) / jnp.maximum(answers.tokens, 1.0)
    h_BT = apart_BT / jnp.sqrt(jnp.where(square > 0, square, 1.0))
    high, low = jnp.max(h_BT), jnp.min(h_BT)
    low = low if released else -low
    above_BT = h_BT / jnp.where(high > 0, high, 1.0)
    below_BT = h_BT / jnp.where(low != 0, low, 1.0)
    return jnp.where(h_BT > 0, above_BT, below_BT)


def redistributed(
    advantages_BT: jax.Array,
    ratio_BT: jax.Array,
    relative_BT: jax.Array,
    strength: float,
    low: float,
    high: float,
) -> jax.Array:
    """A (1 + strength h) where h > 0 and r is outside of the neutral zone, or h <= 0 and inside.

    HAPO. The zone is (1 - low / 2, 1 + high / 2); elsewhere A stays.

    Args:
      advantages_BT: A.
      ratio_BT: r, without gradient.
      relative_BT: h, of `relative_entropy`.
      strength: how much h scales A.
      low, high: bounds of the ratio at h = 0.
    """
    inside_BT = (ratio_BT > 1 - low / 2) & (ratio_BT < 1 + high / 2)
    scaled_BT = (relative_BT > 0) ^ inside_BT
    return advantages_BT * (1 + strength * jnp.where(scaled_BT, relative_BT, 0.0))
