"""Importance ratios of drawn tokens: how much likelier the policy makes them than the old one.

B rows, T tokens, P answers of a row. All functions map (answers, log p [B, T], log p of the old
policy [B, T]) to the logarithm of the ratio [B, T], and differ in what the ratio of a token is made
of. With d_t = log p_t - log p_old,t over the t = 1, 2, ... drawn targets of an answer:

  token            d_t
  sequence         mean of all d: GSPO (arXiv 2507.18071)
  sequence_token   the same, but the gradient of a token is that of its own log p: GSPO-token
  cumulative       d_1 + ... + d_t
  cumulative_mean  (d_1 + ... + d_t) / t
  segment          mean of d over the sentence of the token: SSPO (arXiv 2511.04256)
  prefix_min       d_t + min(d_1, ..., d_t-1): MinPRO (arXiv 2601.22718)

All are 0 where the policy is the old one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from objectives.policy.answers import (
    Answers,
    answer_means,
    places,
    select,
    sums_so_far,
    to_tokens,
)
from objectives.segments import firsts, running_minima, spread_by_number, sums_by_number

# (answers, log p [B, T], log p of the old policy [B, T]) -> log ratio [B, T]
LogRatio = Callable[[Answers, jax.Array, jax.Array], jax.Array]


def token(answers: Answers, log_p_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """log r_t = d_t."""
    return select(answers, log_p_BT) - select(answers, old_BT)


def sequence(answers: Answers, log_p_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """log s = mean of d over the answer, at each of its tokens, with the gradient of the mean."""
    return to_tokens(answers, answer_means(answers, token(answers, log_p_BT, old_BT)))


def own_gradient(ratio: LogRatio) -> LogRatio:
    """The same value, sg[log r] + log p_t - sg[log p_t]: only its own token has a gradient."""

    def log_ratio(answers, log_p_BT, old_BT):
        own_BT = select(answers, log_p_BT)
        value_BT = lax.stop_gradient(ratio(answers, log_p_BT, old_BT))
        return value_BT + own_BT - lax.stop_gradient(own_BT)

    return log_ratio


def cumulative(answers: Answers, log_p_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """log r_t = d_1 + ... + d_t."""
    return sums_so_far(answers, token(answers, log_p_BT, old_BT))


def cumulative_mean(answers: Answers, log_p_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """log r_t = (d_1 + ... + d_t) / t."""
    return cumulative(answers, log_p_BT, old_BT) / jnp.maximum(places(answers), 1.0)


def segment(ends: tuple[int, ...] = ()) -> LogRatio:
    """log r_t = mean of d over the sentence of the token.

    A sentence ends with one of these tokens, or with its answer.

    Args:
      ends: ids of the tokens that end a sentence; without any, an answer is one sentence.
    """

    def log_ratio(answers, log_p_BT, old_BT):
        numbers_BT = sentences(answers, ends)
        ones_BT = answers.live_BT.astype(jnp.float32)
        d_BT = token(answers, log_p_BT, old_BT)
        lengths_BP = jnp.maximum(sums_by_number(numbers_BT, ones_BT, ones_BT), 1.0)
        means_BP = sums_by_number(numbers_BT, ones_BT, d_BT) / lengths_BP
        return select(answers, spread_by_number(numbers_BT, means_BP))

    return log_ratio


def sentences(answers: Answers, ends: tuple[int, ...]) -> jax.Array:
    """The number in its row of the sentence of each token, from 0, int32 [B, T]."""
    ended_BT = jnp.isin(answers.targets_BT, jnp.array(ends, jnp.int32)) & answers.live_BT
    after_BT = jnp.roll(ended_BT, 1, axis=1).at[:, 0].set(False)
    return jnp.cumsum(firsts(answers.numbers_BT) | after_BT, axis=1, dtype=jnp.int32) - 1


def prefix_min(answers: Answers, log_p_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """log r_t = d_t + min(d_1, ..., d_t-1).

    UNCONFIRMED: what the minimum over no token is. Here it is 0, so that r_1 is the token's ratio.
    """
    d_BT = token(answers, log_p_BT, old_BT)
    return d_BT + prefix_minima(answers, d_BT)


def prefix_minima(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """min(x_1, ..., x_t-1) over the drawn targets of the answer; 0 at the first."""
    neutral_BT = jnp.where(answers.live_BT, values_BT, jnp.inf)
    so_far_BT = running_minima(answers.numbers_BT, neutral_BT)
    before_BT = jnp.roll(so_far_BT, 1, axis=1)
    before_BT = jnp.where(firsts(answers.numbers_BT), jnp.inf, before_BT)
    return select(answers, jnp.where(jnp.isfinite(before_BT), before_BT, 0.0))


def make_ratio(name: str, detached: bool = True, ends: tuple[int, ...] = ()) -> LogRatio:
    """The ratio of a name in `RATIOS`.

    Args:
      name: of the ratio.
      detached: of cumulative, cumulative_mean, segment and prefix_min: only the own token has a
        gradient.
      ends: of segment.
    """
    whole = {
        "token": token,
        "sequence": sequence,
        "sequence_token": own_gradient(sequence),
        "cumulative": cumulative,
        "cumulative_mean": cumulative_mean,
        "segment": segment(ends),
        "prefix_min": prefix_min,
    }
    over_prefix = name in ("cumulative", "cumulative_mean", "segment", "prefix_min")
    return own_gradient(whole[name]) if detached and over_prefix else whole[name]


RATIOS = (
    "token",
    "sequence",
    "sequence_token",
    "cumulative",
    "cumulative_mean",
    "segment",
    "prefix_min",
)
