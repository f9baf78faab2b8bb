"""Frozen matrices kept as integer codes with a scale for each group of inputs.

I inputs, O outputs, G groups of inputs. A product makes the weights of one layer at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# NormalFloat: quantiles of N(0, 1) scaled to [-1, 1], with a zero (QLoRA, arXiv 2305.14314,
# section 3 and appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# Inputs that share a scale, as in QLoRA; a matrix that they do not divide has one group.
GROUP = 64

FORMATS = ("int8", "int4", "nf4")


class PackedMatrix(NamedTuple):
    """A matrix [..., I, O] as codes; its arrays are stacked and sharded like the weights.

    Attributes:
      codes: int8 [..., I, O], or uint8 [..., I / 2, O] with the even input in the low four bits.
      scale: float32 [..., G, O].
      table: value of each of the 16 codes, [..., 16]; None for 8 bits.
    """

    codes: jax.Array
    scale: jax.Array
    table: jax.Array | None = None

    def unpack(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weights, [..., I, O]."""
        if self.codes.dtype == jnp.int8:
            values_IO = self.codes.astype(jnp.float32)
        else:
            both_I2O = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)
            shape = (*self.codes.shape[:-2], 2 * self.codes.shape[-2], self.codes.shape[-1])
            codes_IO = both_I2O.reshape(shape)
            values_IO = _look_up(self.table, codes_IO)
        groups = self.scale.shape[-2]
        w_GKO = values_IO.reshape(*values_IO.shape[:-2], groups, -1, values_IO.shape[-1])
        return (w_GKO * self.scale[..., None, :]).reshape(values_IO.shape).astype(dtype)


def _look_up(table, codes_IO):
    # The table is the same for all layers.
    return table.reshape(-1, 16)[0][codes_IO.astype(jnp.int32)]


@functools.partial(jax.jit, static_argnums=1)
def pack(w: jax.Array, kind: str) -> PackedMatrix:
    """Rounds a matrix [..., I, O] to the nearest values of a format.

    The scale of a group is max|w| divided by the largest value of the format: 127 for "int8", 7 for
    "int4" (symmetric), 1 for "nf4".

    Raises:
      ValueError: 4 bits of an odd number of inputs.
    """
    inputs = w.shape[-2]
    if kind != "int8" and inputs % 2:
        raise ValueError(f"{kind} needs an even number of inputs, got {w.shape}")
    groups = inputs // GROUP if inputs % GROUP == 0 else 1
    w_GKO = w.astype(jnp.float32).reshape(*w.shape[:-2], groups, -1, w.shape[-1])
    values = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 9), "nf4": np.array(_NF4)}[kind]
    values = values.astype(np.float32)
    largest = -values[0]
    scale_GO = jnp.maximum(jnp.abs(w_GKO).max(-2) / largest, jnp.finfo(jnp.float32).tiny)
    x_IO = (w_GKO / scale_GO[..., None, :]).reshape(w.shape)
    if kind == "int8":
        codes = jnp.clip(jnp.round(x_IO), -127, 127).astype(jnp.int8)
        return PackedMatrix(codes, scale_GO)
    middles = (values[1:] + values[:-1]) / 2
    codes_IO = jnp.searchsorted(jnp.asarray(middles), x_IO).astype(jnp.uint8)
    low, high = codes_IO[..., 0::2, :], codes_IO[..., 1::2, :]
    table = jnp.broadcast_to(jnp.asarray(values), (*w.shape[:-2], 16))
    return PackedMatrix(low | (high << 4), scale_GO, table)


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of a tree of parameters is a `PackedMatrix`."""
    return isinstance(leaf, PackedMatrix)


def unpack_all(params: Any) -> Any:
    """Parameters with every packed matrix as float32 weights."""
    return jax.tree.map(lambda x: x.unpack() if is_packed(x) else x, params, is_leaf=is_packed)
