"""Outlier Suppression+ (arXiv 2304.09145): inputs of matrices shifted and scaled by channel.

Channels of activations that lie far from zero, or reach far, take the range of a quantizer from all
others. (x - z) / s with s W and the bias b + z W is the same function; the two are as in the
official code (ModelTC/Outlier_Suppression_Plus, migration.py).

I channels of the inputs, T tokens
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The search has a step for every half of the largest input, and at least so many.
STEP = 0.5
FEWEST_STEPS = 100
SMALLEST_THRESHOLD = 1.0


class Range(NamedTuple):
    """Of every channel: the smallest and the largest input, float32 [I]."""

    low: jax.Array
    high: jax.Array


class ThresholdSearch(NamedTuple):
    """Result of `search_threshold`.

    Attributes:
      scale: s, float32 [I].
      threshold: t, a scalar.
      loss: at t.
      first_loss: without a scale, s = 1.
    """

    scale: jax.Array
    threshold: jax.Array
    loss: jax.Array
    first_loss: jax.Array


def channel_range(inputs: jax.Array, valid: jax.Array | None = None) -> Range:
    """The range of every channel of inputs [..., T, I] over the valid tokens, bool [..., T]."""
    x_TI = inputs.astype(jnp.float32).reshape(-1, inputs.shape[-1])
    if valid is None:
        return Range(x_TI.min(0), x_TI.max(0))
    valid_T1 = valid.reshape(-1, 1)
    low_I = jnp.where(valid_T1, x_TI, jnp.inf).min(0)
    return Range(low_I, jnp.where(valid_T1, x_TI, -jnp.inf).max(0))


def middle(found: Range) -> jax.Array:
    """The shift z = (max x + min x) / 2 of every channel, [I]."""
    return (found.high + found.low) / 2


def threshold_scale(found: Range, shift: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """s = max(1, max(x - z) / t, min(x - z) / (-t)), [I]: all |x - z| / s are at most t then."""
    high_I, low_I = found.high - shift, found.low - shift
    return jnp.maximum(1, jnp.maximum(high_I / threshold, -low_I / threshold))


def search_threshold(
    loss: Callable[[jax.Array], jax.Array],
    found: Range,
    shift: jax.Array,
    most_steps: int | None = None,
) -> ThresholdSearch:
    """The threshold t with the smallest loss, on a line from max |x - z|, where s = 1, down to 1.

      t_k = m - k (m - 1) / n,   k = 0..n,   m = max |x - z|,   n = max(100, floor(m / 0.5))

    One candidate is in memory at a time; of equal losses the first counts, and NaN never. Where m
    is at most 1, s = 1.

    Args:
      loss: (scale [I]) -> scalar.
      found: of `channel_range`.
      shift: z, of `middle`, or zeros.
      most_steps: a bound on n, which the official code has not; None is none.
    """
    largest = jnp.maximum(found.high - shift, shift - found.low).max()
    steps = jnp.maximum(FEWEST_STEPS, jnp.floor(largest / STEP)).astype(jnp.int32)
    if most_steps is not None:
        steps = jnp.minimum(steps, most_steps)
    length = jnp.maximum(largest - SMALLEST_THRESHOLD, 0) / steps

    def step(k, best):
        threshold = largest - k * length
        new = loss(threshold_scale(found, shift, threshold))
        better = new < best[1]
        return jnp.where(better, threshold, best[0]), jnp.where(better, new, best[1])

    # The first is computed with a scale of ones, so that inputs of zeros have one, too.
    first = loss(jnp.ones_like(shift))
    count = jnp.where(length > 0, steps + 1, 1)
    threshold, least = jax.lax.fori_loop(1, count, step, (largest, first))
    scale = jnp.where(threshold < largest, threshold_scale(found, shift, threshold), 1.0)
    return ThresholdSearch(scale, threshold, least, first)
