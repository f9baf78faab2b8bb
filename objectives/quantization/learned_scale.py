"""Quantizers with a scale that is trained with the weights: 1, 1.58, 2 and 3 to 8 bits.

One scale alpha for a matrix, an output channel or a group; below, x = w / alpha. They are those of
ParetoQ (arXiv 2502.02631, section 3 and its official code, models/utils_quant.py), of which LSQ is
arXiv 1902.08153. ParetoQ has a scale per output channel; the other granularities keep its formulas.

Every gradient of a scale is multiplied by g = 1 / sqrt(numel * Q), numel being that of one whole
matrix (not of the stack of layers, nor of the weights that share the scale), as in the code of
ParetoQ. LSQ's text counts the weights that share a scale (from memory, unconfirmed): the same where
the granularity is "tensor".

    G, K, O  blocks, inputs in a block, output channels: see `base`
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from objectives.quantization.base import (
    SMALLEST_SCALE,
    Coding,
    Grid,
    Layout,
    LayoutOptions,
    Quantizer,
    assemble,
    make_layout,
)

# ParetoQ clips SEQ at 0.99 so that the largest weight does not round past the top level.
SEQ_CLIP = 0.99


class _Levels(NamedTuple):
    """A learned grid at scale 1."""

    quantize: Callable  # x -> value on the grid
    inside: Callable  # x -> bool, where the gradient of the weight passes
    slope: Callable  # x -> d quantize(w, alpha) / d alpha
    code: Callable  # x -> code as a float
    value: Callable  # code as a float -> value on the grid
    count: int
    numel_factor: float  # Q in the gradient factor


def _clamped(layout: Layout, scale):
    return jnp.maximum(layout.expand(scale), SMALLEST_SCALE)


def _learned(
    name: str, bits: float, layout: Layout, levels: _Levels, first_scale: Callable
) -> Quantizer:
    @jax.custom_jvp
    def on_grid(weights, scale):
        alpha = _clamped(layout, scale)
        q_GKO = alpha * levels.quantize(layout.split(weights) / alpha)
        return layout.merge(q_GKO).astype(weights.dtype)

    @on_grid.defjvp
    def tangent(primals, tangents):
        weights, scale = primals
        d_weights, d_scale = tangents
        x_GKO = layout.split(weights) / _clamped(layout, scale)
        numel = weights.shape[-2] * weights.shape[-1]
        factor = 1.0 / math.sqrt(numel * levels.numel_factor)
        # A clamped scale keeps its gradient, or it could never grow again.
        of_scale_GKO = levels.slope(x_GKO) * layout.spread(d_scale, x_GKO.shape)
        of_weights_GKO = jnp.where(levels.inside(x_GKO), layout.split(d_weights), 0.0)
        d_GKO = of_weights_GKO + factor * of_scale_GKO
        return on_grid(weights, scale), layout.merge(d_GKO).astype(weights.dtype)

    # Only the arguments are kept: they live through the step anyway, x is cheap to form again.
    quantize = jax.checkpoint(on_grid, prevent_cse=False)

    def init(weights):
        return layout.squeeze(first_scale(layout, layout.split(weights)))

    def inside(weights, scale):
        return layout.merge(levels.inside(layout.split(weights) / _clamped(layout, scale)))

    def grid(weights, scale):
        del weights
        return Grid(jnp.maximum(scale.astype(jnp.float32), SMALLEST_SCALE))

    def encode(w_GKO, alpha, zero):
        del zero
        return levels.code(w_GKO / alpha)

    def decode(codes, alpha, zero):
        del zero
        return alpha * levels.value(codes.astype(jnp.float32))

    coding = Coding(encode, decode, levels.count)
    return assemble(
        name,
        bits,
        layout,
        coding,
        init=init,
        quantize=quantize,
        inside=inside,
        grid=grid,
        of_grid=lambda grid: grid.scale,
    )


def elastic_binary(
    bits: float = 1, *, zero_sign: int = 0, **layout: Unpack[LayoutOptions]
) -> Quantizer:
    """Elastic binarization: w_q = alpha * sign(w), alpha starts as mean |w| (ParetoQ, 1 bit).

      d w_q / d w = 1 where |x| <= 1, else 0          d w_q / d alpha = g * sign(w), Q = 1

    Args:
      bits: 1.
      zero_sign: sign of a weight that is exactly zero. 0 is what the official code does, a third
        value that one bit cannot store: its code is that of +alpha. 1 keeps to two values.
    """
    if zero_sign not in (0, 1):
        raise ValueError(f"zero_sign must be 0 or 1; got {zero_sign}")

    def sign(x):
        return jnp.sign(x) if zero_sign == 0 else jnp.where(x >= 0, 1.0, -1.0)

    levels = _Levels(
        quantize=sign,
        inside=lambda x: jnp.abs(x) <= 1,
        slope=sign,
        code=lambda x: jnp.where(x >= 0, 1.0, 0.0),
        value=lambda code: 2 * code - 1,
        count=2,
        numel_factor=1.0,
    )
    layout = make_layout("elastic_binary", bits, (1,), **layout)
    return _learned("elastic_binary", bits, layout, levels, _mean_magnitude)


def ternary(bits: float = 1.58, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """Three levels, alpha * {-2/3, 0, 2/3}: stretched elastic quantization with L = 1.5, s = 0.

    The formulas of `seq`, with Q = 1. As in the official code, q = (L - s) / L = 1 in the gradient
    of the scale outside of the clip range, although the outermost level is 2/3.

    Args:
      bits: 1.58 (or log2(3)).
    """
    layout = make_layout("ternary", 1.58 if bits == math.log2(3) else bits, (1.58,), **layout)
    return _learned("ternary", 1.58, layout, _stretched(1.5, 0.0, 3), _largest_magnitude)


def seq(bits: float = 2, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """Stretched elastic quantization, alpha * {-3/4, -1/4, 1/4, 3/4}; alpha starts as max |w|.

      w_q = alpha * (rint(clip(x, -0.99, 0.99) * L - s) + s) / L,   L = 2, s = 1/2
      d w_q / d w     = 1 where |x| <= 0.99, else 0
      d w_q / d alpha = g * (w_q / alpha - x inside, -q below, q above),   q = (L - s) / L, Q = 1

    rint rounds halves to even: x = 0 goes to 1/4, x = -1/2 to -3/4. ParetoQ, section 3.

    Args:
      bits: 2.
    """
    layout = make_layout("seq", bits, (2,), **layout)
    return _learned("seq", bits, layout, _stretched(2.0, 0.5, 4), _largest_magnitude)


def lsq(bits: float = 4, *, initial: str = "max", **layout: Unpack[LayoutOptions]) -> Quantizer:
    """Learned step size quantization: signed integers times alpha, the step.

      w_q = alpha * clip(rint(x), Qn, Qp),   Qn = -2^(bits-1), Qp = 2^(bits-1) - 1
      d w_q / d w     = 1 where Qn <= x <= Qp, else 0
      d w_q / d alpha = g * (rint(x) - x inside, Qn below, Qp above),   Q = Qp

    ParetoQ has 3 and 4 bits, and the compute-optimal QAT paper (arXiv 2509.22935) 6 bits that no
    public code shows; 5 to 8 bits extend the same formulas.

    Args:
      bits: 3 to 8.
      initial: first alpha. "max" is max |w| / Qp, as in the code of ParetoQ; "mean" is
        2 mean |w| / sqrt(Qp), that of LSQ (from memory, unconfirmed).
    """
    if initial not in ("max", "mean"):
        raise ValueError(f'initial must be "max" or "mean"; got {initial!r}')
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def quantize(x):
        return jnp.clip(jnp.rint(x), low, high)

    def inside(x):
        return (x >= low) & (x <= high)

    def first_scale(layout, w_GKO):
        if initial == "max":
            return _largest_magnitude(layout, w_GKO) / high
        return 2 * _mean_magnitude(layout, w_GKO) / math.sqrt(high)

    levels = _Levels(
        quantize=quantize,
        inside=inside,
        slope=lambda x: jnp.where(inside(x), quantize(x) - x, quantize(x)),
        code=lambda x: quantize(x) - low,
        value=lambda code: code + low,
        count=2**bits,
        numel_factor=high,
    )
    layout = make_layout("lsq", bits, (3, 4, 5, 6, 7, 8), **layout)
    return _learned("lsq", bits, layout, levels, first_scale)


def _stretched(stretch: float, shift: float, count: int) -> _Levels:
    """SEQ's grid at scale 1; `stretch` is the papers' L, `shift` their s."""
    edge = (stretch - shift) / stretch
    lowest = -(count // 2)

    def index(x):
        return jnp.rint(jnp.clip(x, -SEQ_CLIP, SEQ_CLIP) * stretch - shift)

    def quantize(x):
        return (index(x) + shift) / stretch

    def inside(x):
        return jnp.abs(x) <= SEQ_CLIP

    return _Levels(
        quantize=quantize,
        inside=inside,
        slope=lambda x: jnp.where(inside(x), quantize(x) - x, edge * jnp.sign(x)),
        code=lambda x: index(x) - lowest,
        value=lambda code: (code + lowest + shift) / stretch,
        count=count,
        numel_factor=1.0,
    )


def _largest_magnitude(layout: Layout, w_GKO):
    return layout.reduce(jnp.max, jnp.abs(w_GKO))


def _mean_magnitude(layout: Layout, w_GKO):
    return layout.reduce(jnp.mean, jnp.abs(w_GKO))


def paretoq(bits: float, **layout) -> Quantizer | None:
    """ParetoQ's choice: elastic_binary at 1 bit, ternary at 1.58, seq at 2, lsq from 3 to 8.

    From 16 bits on there is no quantizer (None): the weights stay as they are.

    Args:
      bits: 1, 1.58, 2, 3 to 8, or 16 and above.
      **layout: granularity, group_size, contraction_axis.

    Raises:
      ValueError: other widths.
    """
    if bits >= 16:
        return None
    factories = {1: elastic_binary, 1.58: ternary, 2: seq}
    if bits not in factories and bits not in range(3, 9):
        raise ValueError(f"bits must be 1, 1.58, 2, 3 to 8, or 16 and above; got {bits:g}")
    return factories.get(bits, lsq)(bits=bits, **layout)
