"""The searches of AWQ (arXiv 2306.00978): a scale for each input of a matrix, and where to clip.

I inputs, O output channels, G groups of inputs with scales of their own, K inputs in a group,
T tokens. Everything is as in the official code (mit-han-lab/llm-awq, auto_scale and auto_clip)
unless said otherwise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.quantization.base import Layout, Quantizer
from objectives.quantization.gptq import round_to_nearest

# The ratios that are tried are i / RATIOS for i = 0..RATIOS - 1, the shrinks of a clip i / RATIOS
# for i = 0..SHRINKS - 1; a power of a magnitude is at least SMALLEST.
RATIOS = 20
SHRINKS = 10
SMALLEST = 1e-4

ERRORS = ("squared", "absolute")


class ScaleSearch(NamedTuple):
    """Result of `search_scale`.

    Attributes:
      scale: [I] float32, of the best ratio.
      losses: [RATIOS] float32, of all ratios; the first is that of rounding to nearest.
    """

    scale: jax.Array
    losses: jax.Array


def magnitude(inputs: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """s_X = mean over tokens of |x|, float32 [I].

    Args:
      inputs: [..., T, I].
      valid: [..., T] bool, tokens that count; None is all.
    """
    x_TI = jnp.abs(inputs.astype(jnp.float32)).reshape(-1, inputs.shape[-1])
    if valid is None:
        return x_TI.mean(0)
    return jnp.where(valid.reshape(-1, 1), x_TI, 0).sum(0) / jnp.maximum(valid.sum(), 1)


def awq_scale(magnitude_I: jax.Array, ratio: jax.Array | float) -> jax.Array:
    """s = u / sqrt(max u min u), u = max(s_X^ratio, 1e-4); float32 [I], all 1 for ratio 0.

    Args:
      magnitude_I: s_X, see `magnitude`.
      ratio: 0 to 1, the alpha of the paper.
    """
    u_I = jnp.maximum(magnitude_I.astype(jnp.float32) ** ratio, SMALLEST)
    return u_I / jnp.sqrt(u_I.max() * u_I.min())


def scaled_rounding(weights: jax.Array, scale_I: jax.Array, quantizer: Quantizer) -> jax.Array:
    """W' = Q(s W) / s, [I, O]: what an input x meets as x / s times Q(s W)."""
    scaled_IO = weights.astype(jnp.float32) * scale_I[:, None]
    return round_to_nearest(scaled_IO, quantizer) / scale_I[:, None]


def search_scale(loss: Callable[[jax.Array], jax.Array], magnitude_I: jax.Array) -> ScaleSearch:
    """The scale of the ratio i / 20, i = 0..19, with the smallest loss, the first of equal ones.

    One candidate is in memory at a time. A loss that is NaN is never the smallest.

    Args:
      loss: (scale [I]) -> scalar, such as `output_error` of a block with `scaled_rounding`.
      magnitude_I: see `magnitude`.
    """
    ratios = jnp.arange(RATIOS, dtype=jnp.float32) / RATIOS
    losses = jax.lax.map(lambda ratio: loss(awq_scale(magnitude_I, ratio)), ratios)
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return ScaleSearch(awq_scale(magnitude_I, ratios[best]), losses)


def output_error(
    target: jax.Array, output: jax.Array, importance: jax.Array, error: str = "squared"
) -> jax.Array:
    """sum_t a_t mean_o |y_to - y'_to|^p / sum_t a_t, p = 2 ("squared") or 1 ("absolute").

    AWQ is "squared" with equal a_t; MBQ and QIG (arXiv 2603.17809) weight tokens and take
    "absolute".

    Args:
      target: y, [..., T, O].
      output: y', of the same shape.
      importance: a, [..., T], not negative; 0 takes a token out, whatever its outputs.
      error: "squared" or "absolute".

    Raises:
      ValueError: another error.
    """
    if error not in ERRORS:
        raise ValueError(f"error must be one of {ERRORS}; got {error!r}")
    difference = target.astype(jnp.float32) - output.astype(jnp.float32)
    size = jnp.square(difference) if error == "squared" else jnp.abs(difference)
    a_T = importance.astype(jnp.float32)
    size_T = jnp.where(a_T > 0, size.mean(-1), 0)
    return (a_T * size_T).sum() / jnp.where(a_T.sum() > 0, a_T.sum(), 1)


def search_clip(
    weights: jax.Array,
    inputs: jax.Array,
    quantizer: Quantizer,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Where to clip the weights of every group of every output channel before quantization.

    Of c = max|w| (1 - i / 20), i = 0..9, the one with the smallest error of the group's share of
    the output, the first of equal ones:

      sum_t a_t (sum_k x_tk (Q(clip(w, -c, c)) - w)_k)^2 = d^T (sum_t a_t x_t x_t^T) d

    computed by the right-hand side, so that the cost of a candidate does not depend on T. Where a
    matrix has one scale ("tensor"), it has one c.

    Args:
      weights: [I, O].
      inputs: [T, I].
      quantizer: with contraction_axis=-2.
      importance: a, [T]; None counts every token once.

    Returns:
      c, float32 [G, 1, O], or [1, 1, 1]: for `clip_weights`.

    Raises:
      ValueError: a quantizer of tables, or a group that does not divide the inputs.
    """
    layout = _layout(quantizer)
    w_GKO = layout.split(weights)
    x_TGK = inputs.astype(jnp.float32).reshape(-1, *w_GKO.shape[:2])
    left_TGK = x_TGK if importance is None else x_TGK * importance[:, None, None]
    gram_GKK = jnp.einsum("tgk,tgl->gkl", left_TGK, x_TGK, precision="highest")
    largest = layout.reduce(jnp.max, jnp.abs(w_GKO))

    def error(shrink):
        clipped_IO = clip_weights(weights, largest * (1 - shrink), quantizer)
        d_GKO = layout.split(round_to_nearest(clipped_IO, quantizer)) - w_GKO
        g_GKO = jnp.einsum("gkl,glo->gko", gram_GKK, d_GKO, precision="highest")
        return layout.reduce(jnp.sum, d_GKO * g_GKO)

    shrinks = jnp.arange(SHRINKS, dtype=jnp.float32) / RATIOS
    best = jnp.argmin(jax.lax.map(error, shrinks), axis=0)
    return largest * (1 - shrinks[best])


def clip_weights(weights: jax.Array, limits: jax.Array, quantizer: Quantizer) -> jax.Array:
    """Weights [..., I, O] cut to [-c, c], in their dtype; c of `search_clip` [..., G, 1, O]."""
    layout = _layout(quantizer)
    clipped_GKO = jnp.clip(layout.split(weights), -limits, limits)
    return layout.merge(clipped_GKO).astype(weights.dtype)


def _layout(quantizer: Quantizer) -> Layout:
    if quantizer.contraction_axis != -2:
        raise ValueError("AWQ needs a quantizer with contraction_axis=-2")
    return Layout(quantizer.granularity, quantizer.group_size, quantizer.contraction_axis)
