"""Matrix products of the layers.

B batch, T length, D width in, F width out.
"""

from typing import Any

import flax.linen as nn
import jax

from lm.model import xla_cpu
from lm.model.packed_matrix import is_packed


def project(x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x @ w, [B, T, F], in the dtype of both; see `xla_cpu.multiply`."""
    axis = nn.logical_to_mesh_axes(("length",))[0]
    if axis and jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1:
        # To merge rows and tokens would gather the tokens of a row from all their devices.
        return x_BTD @ w_DF
    return xla_cpu.multiply(x_BTD, w_DF)


def plain_product(path: str, x_BTD: jax.Array, w_DF: jax.Array, scale: Any) -> jax.Array:
    """x @ w, [B, T, F], in the dtype of x: the default `product` of a model.

    Args:
      path: of the weights; not used.
      x_BTD: inputs, in the compute dtype.
      w_DF: weights, as they are stored, or a `PackedMatrix` of them.
      scale: of a quantizer; not used.
    """
    del path, scale

    def multiply(x_BTD, w_DF):
        if is_packed(w_DF):
            return project(x_BTD, w_DF.unpack(x_BTD.dtype))
        return project(x_BTD, w_DF.astype(x_BTD.dtype))

    # Under checkpoint the scan over layers keeps no stacked copy of w for the backward pass.
    return jax.checkpoint(multiply, prevent_cse=False)(x_BTD, w_DF)
