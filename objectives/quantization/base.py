"""What a quantizer is, and how a weight matrix is cut into the blocks that share one scale.

Matrices are [..., I, O]: contraction axis, then output channel; leading axes (stacked layers) are
batch axes, each with scales of its own. All arithmetic is on the blocked view [..., G, K, O].

    I  contraction (input) axis          G  blocks along I that have scales of their own
    O  output channels                   K  inputs in a block, I = G * K
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp

GRANULARITIES = ("tensor", "channel", "group")

# ParetoQ (arXiv 2502.02631, official code, utils_quant.py) clamps learned scales from below.
SMALLEST_SCALE = 1e-5


class Grid(NamedTuple):
    """The numbers that turn integer codes into weights, fixed.

    Both are float32 and broadcast against blocks: a matrix [..., I, O] has them as [..., 1, 1]
    (tensor), [..., 1, O] (channel) or [..., I / group_size, O] (group); where the quantizer's
    `contraction_axis` is -1, the last two axes are exchanged.
    """

    scale: jax.Array
    zero: jax.Array | None = None  # code of 0, only for asymmetric grids


class Quantizer(NamedTuple):
    """A way to put weights on a grid of few values; made by a factory such as `lsq(bits=4)`.

    Pure functions of arrays. `weights` are float32 or bfloat16, [..., I, O].

    Attributes:
      init: (weights) -> scale: a float32 array of the shape that `Grid` tells for scales that are
        learned, () for quantizers that read their scale from the weights at every call.
      quantize: (weights, scale) -> weights on the grid, same shape and dtype, computed in float32.
        Reverse-mode differentiable in both arguments, by the rule of the quantizer's docstring.
      inside: (weights, scale) -> bool, where the weight is within the clip range.
      grid: (weights, scale) -> Grid, the fixed numbers behind `quantize`.
      encode: (weights, grid) -> uint8 codes in [0, levels), same shape.
      decode: (codes, grid) -> float32 weights; of `encode` with `grid` it is `quantize`.
      of_grid: (grid) -> the scale that has this grid, () where nothing is learned.
      name: of the factory.
      bits: width of a code; 1.58 stands for three levels.
      granularity: "tensor", "channel" or "group".
      group_size: K, or 0 when the granularity is not "group".
      contraction_axis: -2, or -1 for a table of which a row, not a column, is one channel.
      levels: number of codes.
    """

    init: Callable[[jax.Array], Any]
    quantize: Callable[[jax.Array, Any], jax.Array]
    inside: Callable[[jax.Array, Any], jax.Array]
    grid: Callable[[jax.Array, Any], Grid]
    encode: Callable[[jax.Array, Grid], jax.Array]
    decode: Callable[[jax.Array, Grid], jax.Array]
    of_grid: Callable[[Grid], Any]
    name: str
    bits: float
    granularity: str
    group_size: int
    contraction_axis: int
    levels: int


class Layout(NamedTuple):
    """How a matrix is cut into blocks; made by `make_layout`, see `LayoutOptions`."""

    granularity: str
    group_size: int
    contraction_axis: int

    def split(self, weights: jax.Array) -> jax.Array:
        """[..., I, O] -> float32 blocks [..., G, K, O]."""
        w_IO = weights.astype(jnp.float32)
        if weights.ndim < 2:
            raise ValueError(f"weights must be [..., in, out]; got {weights.shape}")
        if self.contraction_axis == -1:
            w_IO = jnp.swapaxes(w_IO, -1, -2)
        inputs, outputs = w_IO.shape[-2:]
        if self.granularity != "group":
            return w_IO[..., None, :, :]
        if inputs % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the {inputs} inputs "
                f"of a matrix {weights.shape}"
            )
        groups = inputs // self.group_size
        return w_IO.reshape(*w_IO.shape[:-2], groups, self.group_size, outputs)

    def merge(self, w_GKO: jax.Array) -> jax.Array:
        """Blocks [..., G, K, O] -> [..., I, O]."""
        w_IO = w_GKO.reshape(*w_GKO.shape[:-3], -1, w_GKO.shape[-1])
        return jnp.swapaxes(w_IO, -1, -2) if self.contraction_axis == -1 else w_IO

    def reduce(self, function: Callable, w_GKO: jax.Array) -> jax.Array:
        """`function` (jnp.max...) over the weights that share a scale: [..., G, 1, O | 1]."""
        axes = (-2, -1) if self.granularity == "tensor" else (-2,)
        return function(w_GKO, axis=axes, keepdims=True)

    def spread(self, scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A stored scale given to all weights that share it, [..., G, K, O]; linear.

        Its transpose is the sum over these weights.
        """
        scale_G1O = jnp.broadcast_to(self.expand(scale), (*shape[:-2], 1, shape[-1]))
        if self.granularity == "group":
            return jnp.broadcast_to(scale_G1O, shape)
        # As a product with ones, so that the transpose is one, too: a sum over rows that XLA on CPU
        # fuses with other passes runs down one column after the other, which is far slower.
        ones_GK = jnp.ones(shape[:-1], jnp.float32)
        return jnp.einsum("...k,...o->...ko", ones_GK, scale_G1O[..., 0, :], precision="highest")

    def expand(self, scale: jax.Array) -> jax.Array:
        """A stored scale, [..., G, O | 1], beside blocks: [..., G, 1, O | 1]."""
        if self.contraction_axis == -1:
            scale = jnp.swapaxes(scale, -1, -2)
        return scale.astype(jnp.float32)[..., :, None, :]

    def squeeze(self, scale_G1O: jax.Array) -> jax.Array:
        """The inverse of `expand`."""
        scale_GO = scale_G1O[..., 0, :]
        return jnp.swapaxes(scale_GO, -1, -2) if self.contraction_axis == -1 else scale_GO


class LayoutOptions(TypedDict, total=False):
    """Which weights share a scale: arguments of every quantizer's factory beside its own.

    The defaults are those of `make_layout` unless the factory says otherwise. Factories raise
    ValueError for a width, a layout or an option that they do not have.

    Attributes:
      granularity: "tensor" (one scale for a matrix), "channel" (one for each output channel, the
        default) or "group" (one for each `group_size` inputs of an output channel).
      group_size: inputs in a group; ignored where the granularity is not "group".
      contraction_axis: of the matrix, -2 ([in, out], the default) or -1 ([out, in]: an embedding
        table, of which a row is one channel).
    """

    granularity: str
    group_size: int
    contraction_axis: int


def make_layout(
    name: str,
    bits: float,
    widths: tuple[float, ...],
    *,
    granularity: str = "channel",
    group_size: int = 0,
    contraction_axis: int = -2,
) -> Layout:
    """The layout of the quantizer `name`, its arguments checked; see `LayoutOptions`.

    Args:
      name: of the factory, for messages.
      bits: the width that was asked for.
      widths: those that the factory offers.
      granularity: this and the rest as in `LayoutOptions`.
      group_size: counts only where the granularity is "group".
      contraction_axis: -2 or -1.

    Raises:
      ValueError: an argument other than those.
    """
    check_bits(name, bits, widths)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}; got {granularity!r}")
    if contraction_axis not in (-2, -1):
        raise ValueError(f"contraction_axis must be -2 or -1; got {contraction_axis}")
    if granularity != "group":
        return Layout(granularity, 0, contraction_axis)
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer; got {group_size}")
    return Layout(granularity, group_size, contraction_axis)


def check_bits(name: str, bits: float, widths: tuple[float, ...]) -> None:
    """ValueError unless the quantizer `name` offers the width `bits`."""
    if bits not in widths:
        offered = ", ".join(f"{width:g}" for width in widths)
        raise ValueError(f"{name} has {offered} bits; got bits={bits:g}")


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most |x|, 0 for 0: the exponent's bits of float32 x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class Coding(NamedTuple):
    """Codes of one quantizer on blocks x = weight / scale, before anything is known of layouts.

    Attributes:
      encode: (w_GKO, scale, zero) -> codes as float32 or integers, in [0, levels).
      decode: (codes as uint8, scale, zero) -> float32 weights.
      levels: number of codes.
      round: (w_GKO, scale, zero) -> float32 weights, decode(encode) by a shorter way.
    """

    encode: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]
    levels: int
    round: Callable[..., jax.Array] | None = None


def assemble(
    name: str,
    bits: float,
    layout: Layout,
    coding: Coding,
    *,
    init: Callable,
    quantize: Callable,
    inside: Callable,
    grid: Callable,
    of_grid: Callable,
) -> Quantizer:
    """A `Quantizer` from functions of blocks and stored scales.

    `encode` and `decode` take the number of blocks from the grid that they are given, not from the
    layout, so that one row of a matrix (GPTQ) is coded with the grid of the whole of it.
    """

    def blocks(array, grid):
        swap = layout.contraction_axis == -1
        a_IO = jnp.swapaxes(array, -1, -2) if swap else array
        groups = layout.expand(grid.scale).shape[-3]
        inputs, outputs = a_IO.shape[-2:]
        if inputs % groups:
            raise ValueError(f"{groups} groups of scales do not divide {inputs} inputs")
        return a_IO.reshape(*a_IO.shape[:-2], groups, inputs // groups, outputs)

    def expanded(grid):
        return layout.expand(grid.scale), None if grid.zero is None else layout.expand(grid.zero)

    def encode(weights, grid):
        w_GKO = blocks(weights.astype(jnp.float32), grid)
        return layout.merge(coding.encode(w_GKO, *expanded(grid)).astype(jnp.uint8))

    def decode(codes, grid):
        return layout.merge(coding.decode(blocks(codes, grid), *expanded(grid)))

    return Quantizer(
        init, quantize, inside, grid, encode, decode, of_grid, name, bits, *layout, coding.levels
    )
