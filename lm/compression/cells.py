"""Weights for training that have given codes and are as close to other weights as these allow.

A weight that training starts from a code's own value has half a step of the grid to go before its
code changes. At 4 bits in groups of 32 that is some 5e-3, and Adam at a rate of 2e-5 moves by no
more than 1e-3 in 50 steps: codes would stay what they are. In the cell of its code, next to the
weight before quantization, it may be just below the limit, as it is in training from the beginning.

Leading axes of a matrix [..., I, O] are stacked layers.
"""

import functools

import jax
import jax.numpy as jnp

from lm.compression.packed import Coded
from objectives.quantization import Quantizer
from objectives.quantization.base import Grid

# Halvings of the way from a code's value to the weight; 1/256 of it is given up at most.
_HALVINGS = 8


def into_cells(weights: jax.Array, coded: Coded) -> jax.Array:
    """The last point on the way from the codes' values to the weights that has the same codes.

      w' = q + t (w - q),  t in [0, 1] the largest multiple of 2^-8 with encode(w') = code,

    q being the value of the code. Points beyond the outermost codes count as outside, as no
    gradient reaches them. `quantize` of the result, with the scale of the codes' grid, is q.

    Args:
      weights: [..., I, O], those before quantization.
      coded: their codes, perhaps of a method such as GPTQ, which are not the nearest ones; of a
        quantizer that learns its scale.
    """
    if isinstance(coded.quantizer, Quantizer):
        return _into_cells(coded.quantizer, weights, coded.decode(), coded.codes, coded.grid)
    layers = zip(weights, coded.layers(), strict=True)
    return jnp.stack([into_cells(layer, of_layer) for layer, of_layer in layers])


@functools.partial(jax.jit, static_argnums=0)
def _into_cells(
    quantizer: Quantizer, weights: jax.Array, values: jax.Array, codes: jax.Array, grid: Grid
) -> jax.Array:
    scale = quantizer.of_grid(grid)
    start = values.astype(jnp.float32)
    way = weights.astype(jnp.float32) - start

    def point(share):
        # As it is stored: a rounding to 16 bits may leave the cell.
        return jnp.where(share == 1, weights, (start + share * way).astype(weights.dtype))

    def fits(share):
        codes_there = quantizer.encode(point(share), grid)
        return (codes_there == codes) & quantizer.inside(point(share), scale)

    share = jnp.where(fits(1.0), 1.0, 0.0)
    for i in range(1, _HALVINGS + 1):
        further = jnp.minimum(share + 2.0**-i, 1.0)
        share = jnp.where(fits(further), further, share)
    return point(share)
