"""How uncertain a token was among those of its batch.

B rows, T tokens. Entropies are of the distribution that was drawn from.
"""

from typing import NamedTuple

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


class EntropyScale(NamedTuple):
    """What HAPO's scale of log entropies is made of, float32 scalars; see `entropy_scale`.

    Attributes:
      pivot: log entropy where h is 0.
      deviation: root of the mean square of log entropies less the pivot; 0 before any are known.
      high, low: what h above 0 and other h are divided by; 0 where there are none.
    """

    pivot: jax.Array
    deviation: jax.Array
    high: jax.Array
    low: jax.Array


def no_scale() -> EntropyScale:
    """The scale before any entropies are known: every h is 0."""
    return EntropyScale(*(jnp.zeros((), jnp.float32) for _ in EntropyScale._fields))


def entropy_scale(
    answers: Answers, entropy_BT: jax.Array, share: float = 0.8, released: bool = False
) -> EntropyScale:
    """The scale of the log entropies e = log H of all drawn targets of a batch: HAPO.

    The pivot is the quantile `share` of e, and h = (e - pivot) / rms(e - pivot). Positive h are
    then divided by the largest one, and others by the size of the smallest one.

    The released code (starriver030515/HAPO) divides the others by the smallest one, which is
    negative, so that no h is below 0 and the branches for h below 0 are not reached but at 0. The
    sign intended is INFERRED.

    Args:
      answers: of the whole batch.
      entropy_BT: H, nats.
      share: in [0, 1].
      released: the form of the released code.
    """
    log_BT = _logarithms(select(answers, entropy_BT))
    pivot = quantile(answers, log_BT, share)
    apart_BT = select(answers, log_BT - pivot)
    square = jnp.sum(jnp.square(apart_BT)) / jnp.maximum(answers.tokens, 1.0)
    deviation = jnp.sqrt(square)
    h_BT = apart_BT / jnp.where(deviation > 0, deviation, 1.0)
    low = jnp.min(h_BT)
    return EntropyScale(pivot, deviation, jnp.max(h_BT), low if released else -low)


def on_scale(scale: EntropyScale, entropy: jax.Array) -> jax.Array:
    """h of entropies, of the same shape: in [-1, 1] for those that the scale was made of."""
    known = scale.deviation > 0
    apart = (_logarithms(entropy) - scale.pivot) / jnp.where(known, scale.deviation, 1.0)
    h = jnp.where(known, apart, 0.0)
    above = h / jnp.where(scale.high > 0, scale.high, 1.0)
    below = h / jnp.where(scale.low != 0, scale.low, 1.0)
    return jnp.where(h > 0, above, below)


def relative_entropy(
    answers: Answers, entropy_BT: jax.Array, share: float = 0.8, released: bool = False
) -> jax.Array:
    """h of all drawn targets of the batch on the scale of their own entropies, [B, T].

    Arguments are those of `entropy_scale`.
    """
    scale = entropy_scale(answers, entropy_BT, share, released)
    return select(answers, on_scale(scale, select(answers, entropy_BT)))


def temperature_factors(scale: EntropyScale, entropy: jax.Array, tau: float) -> jax.Array:
    """1 + tau h, h held within [-1, 1]: HAPO's factor of the temperature of a token.

    Args:
      scale: of the batch before, since that of the answers is known only when they are drawn.
      entropy: of the distribution at the temperature itself, nats.
      tau: of the factor, in [0, 1).
    """
    return 1 + tau * jnp.clip(on_scale(scale, entropy), -1, 1)


def _logarithms(entropy: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(entropy, _LEAST))


def redistributed(
    advantages_BT: jax.Array,
    ratio_BT: jax.Array,
    relative_BT: jax.Array,
    strength: float,
    low: jax.Array | float,
    high: jax.Array | float,
) -> jax.Array:
    """A (1 + strength h) where h > 0 and r is outside of the neutral zone, or h <= 0 and inside.

    HAPO. The zone is (1 - low / 2, 1 + high / 2); elsewhere A stays. In the released code it is
    that of the bounds of each token, which are wider by h.

    Args:
      advantages_BT: A.
      ratio_BT: r, without gradient.
      relative_BT: h, of `relative_entropy`.
      strength: how much h scales A.
      low, high: bounds of the ratio, numbers or [B, T].
    """
    inside_BT = (ratio_BT > 1 - low / 2) & (ratio_BT < 1 + high / 2)
    scaled_BT = (relative_BT > 0) ^ inside_BT
    return advantages_BT * (1 + strength * jnp.where(scaled_BT, relative_BT, 0.0))
