"""Asymmetric integers with a learned range: a scale and a zero point that are trained.

G, K, O  blocks, inputs in a block, output channels: see `base`
"""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from objectives.quantization.base import (
    SMALLEST_SCALE,
    Coding,
    Grid,
    LayoutOptions,
    Quantizer,
    assemble,
    make_layout,
)


class Range(NamedTuple):
    """The learned ends of what the codes stand for, each float32 of the shape of `Grid.scale`."""

    low: jax.Array
    high: jax.Array


def learned_range(bits: float = 4, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """w_q = s (clip(rint(w / s) + z, 0, N) - z) with a learned range [low, high], N = 2^bits - 1.

      s = (high - low) / N,   z = rint(-low / s)

    It starts as that of `minmax`: low = min(w, 0), high = max(w, 0). Gradients are those of
    automatic differentiation with d rint(x) / d x = 1, as in LSQ+ (arXiv 2004.09576, from memory,
    unconfirmed), which learns s and an offset that is no integer; the ends of the range, an integer
    zero point (what files of other programs hold) and the factor 1 / sqrt(numel N) of LSQ on the
    gradient of both are ours. A weight outside of the range moves its end alone. With
    `quantization.relative_scale_steps` an end that is 0 stays there.

    Args:
      bits: 2 to 8.
    """
    layout = make_layout("learned_range", bits, (2, 3, 4, 5, 6, 7, 8), **layout)
    top = 2.0**bits - 1

    def places(low, high):
        """(s, z) of expanded ends, differentiable in both."""
        scale = jnp.maximum((high - low) / top, SMALLEST_SCALE)
        return scale, _straight_through(-low / scale)

    def on_grid(weights, ends):
        numel = weights.shape[-2] * weights.shape[-1]
        factor = 1 / math.sqrt(numel * top)
        scale, zero = places(*(layout.expand(_slowed(x, factor)) for x in ends))
        code_GKO = _straight_through(layout.split(weights) / scale) + zero
        # Not `jnp.clip`, which halves the gradient of a code at an end.
        code_GKO = jnp.where(code_GKO < 0, 0, jnp.where(code_GKO > top, top, code_GKO))
        q_GKO = scale * (code_GKO - zero)
        return layout.merge(q_GKO).astype(weights.dtype)

    # Only the arguments are kept: they live through the step anyway.
    quantize = jax.checkpoint(on_grid, prevent_cse=False)

    def init(weights):
        w_GKO = layout.split(weights)
        low = jnp.minimum(layout.reduce(jnp.min, w_GKO), 0)
        high = jnp.maximum(layout.reduce(jnp.max, w_GKO), 0)
        return Range(layout.squeeze(low), layout.squeeze(high))

    def grid(weights, ends):
        del weights
        return Grid(*map(layout.squeeze, places(*map(layout.expand, ends))))

    def inside(weights, ends):
        scale, zero = places(*map(layout.expand, ends))
        code_GKO = jnp.rint(layout.split(weights) / scale) + zero
        return layout.merge((code_GKO >= 0) & (code_GKO <= top))

    def of_grid(grid):
        low = -grid.zero * grid.scale
        return Range(low, low + top * grid.scale)

    def encode(w_GKO, scale, zero):
        return jnp.clip(jnp.rint(w_GKO / scale) + zero, 0, top)

    def decode(codes, scale, zero):
        return scale * (codes.astype(jnp.float32) - zero)

    return assemble(
        "learned_range",
        bits,
        layout,
        Coding(encode, decode, 2**bits),
        init=init,
        quantize=quantize,
        inside=inside,
        grid=grid,
        of_grid=of_grid,
    )


def _slowed(x: jax.Array, factor: float) -> jax.Array:
    """x, its gradient multiplied by the factor."""
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)


def _straight_through(x: jax.Array) -> jax.Array:
    """rint(x) with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.rint(x) - x)
