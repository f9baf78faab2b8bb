"""Quantizers that read their scale from the weights at every call: their state is ().

The scale follows the weights, so nothing is ever far outside of the grid: the gradient of a weight
passes unchanged (straight-through), and none flows through the scale.
With `contraction_axis=-1` activations [..., T, D] have a scale per token: see `activations`.

    G, K, O  blocks, inputs in a block, output channels: see `base`
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from objectives.quantization.base import (
    Coding,
    Grid,
    Layout,
    LayoutOptions,
    Quantizer,
    assemble,
    make_layout,
)

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def usable(scale: jax.Array) -> jax.Array:
    """The scale, or 1 where it is zero or subnormal (a block of zeros stays zero)."""
    return jnp.where(scale < _SMALLEST_NORMAL, 1.0, scale)


def divide_exactly(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """x / divisor to the last bit, where XLA multiplies by the reciprocal of a constant or a
    broadcast array.

    That bit decides for a weight halfway between two levels, and weights that were on another grid
    before (a file in Q4_1) often are.
    """
    return x / jnp.where(jnp.isnan(x), jnp.nan, divisor)


def from_data(
    name: str,
    bits: float,
    layout: Layout,
    coding: Coding,
    find_grid: Callable,
    within: Callable = lambda w_GKO, scale, zero: jnp.ones(w_GKO.shape, bool),
) -> Quantizer:
    """A quantizer without state from its coding and `find_grid`: blocks -> (scale, zero | None).

    Both results of `find_grid` are [..., G, 1, O | 1]; `within` says which weights do not saturate.
    """

    def through_codes(w_GKO, scale, zero):
        return coding.decode(coding.encode(w_GKO, scale, zero), scale, zero)

    nearest = coding.round or through_codes

    @jax.custom_jvp
    def on_grid(weights):
        w_GKO = layout.split(weights)
        return layout.merge(nearest(w_GKO, *find_grid(w_GKO))).astype(weights.dtype)

    on_grid.defjvps(lambda tangent, on_grid, weights: tangent)

    def quantize(weights, scale=()):
        del scale
        return on_grid(weights)

    def inside(weights, scale=()):
        del scale
        w_GKO = layout.split(weights)
        return layout.merge(within(w_GKO, *find_grid(w_GKO)))

    def grid(weights, scale=()):
        del scale
        scale, zero = find_grid(layout.split(weights))
        return Grid(layout.squeeze(scale), None if zero is None else layout.squeeze(zero))

    def init(weights):
        layout.split(weights)  # refuses a shape that does not fit
        return ()

    return assemble(
        name,
        bits,
        layout,
        coding,
        init=init,
        quantize=quantize,
        inside=inside,
        grid=grid,
        of_grid=lambda grid: (),
    )


def absmax(bits: float = 8, *, bound: str = "level", **layout: Unpack[LayoutOptions]) -> Quantizer:
    """Symmetric integers: w_q = s * clip(rint(w / s), -2^(bits-1), Q), Q = 2^(bits-1) - 1.

      s = max |w| / Q         (bound "level": the largest weight lies on the top level)
      s = max |w| / (Q + 0.5) (bound "half": it lies at the outer edge of the top level)
      d w_q / d w = 1

    "level" is the grid of arXiv 2505.14302; "half" is that of qwix 0.1.8, bit for bit. On it the
    largest weight is a tie between two levels: +max |w| goes to Q s, and -max |w| to -(Q + 1) s,
    beyond itself, or to -Q s, as the last bit of the division falls.

    Args:
      bits: 2 to 8.
      bound: "level" or "half".
    """
    if bound not in ("level", "half"):
        raise ValueError(f'bound must be "level" or "half"; got {bound!r}')
    layout = make_layout("absmax", bits, (2, 3, 4, 5, 6, 7, 8), **layout)
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    reach = high if bound == "level" else high + 0.5

    def find_grid(w_GKO):
        return usable(layout.reduce(jnp.max, jnp.abs(w_GKO)) / reach), None

    def encode(w_GKO, scale, zero):
        del zero
        return jnp.clip(jnp.rint(w_GKO / scale), low, high) - low

    def decode(codes, scale, zero):
        del zero
        return scale * (codes.astype(jnp.float32) + low)

    return from_data("absmax", bits, layout, Coding(encode, decode, 2**bits), find_grid)


def minmax(bits: float = 8, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """Asymmetric integers: w_q = s * (clip(rint(w / s) + z, 0, 2^bits - 1) - z).

      s = (max(w, 0) - min(w, 0)) / (2^bits - 1),   z = -rint(min(w, 0) / s),   d w_q / d w = 1

    Zero is in the range and is a level, as in the official code of GPTQ (arXiv 2210.17323); AWQ's
    (2306.00978) takes the range without it and clips z instead: the same wherever a block has
    weights of both signs.

    Args:
      bits: 2 to 8.
    """
    layout = make_layout("minmax", bits, (2, 3, 4, 5, 6, 7, 8), **layout)
    top = 2.0**bits - 1

    def find_grid(w_GKO):
        lowest = jnp.minimum(layout.reduce(jnp.min, w_GKO), 0)
        highest = jnp.maximum(layout.reduce(jnp.max, w_GKO), 0)
        scale = usable(divide_exactly(highest - lowest, top))
        return scale, -jnp.rint(lowest / scale)

    def encode(w_GKO, scale, zero):
        return jnp.clip(jnp.rint(divide_exactly(w_GKO, scale)) + zero, 0, top)

    def decode(codes, scale, zero):
        return scale * (codes.astype(jnp.float32) - zero)

    return from_data("minmax", bits, layout, Coding(encode, decode, 2**bits), find_grid)
