"""Low-precision floats with a scale for a block: mxfp4, nvfp4, fp8_e4m3, fp8_e5m2.

Rounding to a float format is done in float32 arithmetic, with the format's numbers from ml_dtypes:
exact on every backend, including those that lack the type. Scales are read from the weights, their
state is () (see `data_scale`), and the gradient of a weight passes unchanged.

    G, K, O  blocks, inputs in a block, output channels: see `base`
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from objectives.quantization.base import (
    Coding,
    LayoutOptions,
    Quantizer,
    make_layout,
    power_below,
)
from objectives.quantization.data_scale import from_data, usable

# Scales of MX are powers of two with 8 bits of exponent (E8M0); 2^-127 is subnormal in float32.
_SMALLEST_EXPONENT = -126

_GROUPS_OF_16 = {"granularity": "group", "group_size": 16}
_GROUPS_OF_32 = {"granularity": "group", "group_size": 32}


class Float(NamedTuple):
    """A float format with a sign bit, rounding half to even, saturating at its largest value."""

    dtype: np.dtype
    bits: int
    mantissa_bits: int
    smallest_exponent: int  # of a normal number
    largest: float

    @classmethod
    def of(cls, dtype) -> "Float":
        """From an ml_dtypes type of at most 8 bits."""
        info = ml_dtypes.finfo(dtype)
        return cls(np.dtype(dtype), info.bits, info.nmant, int(info.minexp), float(info.max))

    def _power(self, x):
        """2^exponent of |x|, at least that of the smallest normal number."""
        return jnp.maximum(power_below(x), 2.0**self.smallest_exponent)

    def round(self, x: jax.Array) -> jax.Array:
        """The nearest value of the format, as float32."""
        x = jnp.clip(x, -self.largest, self.largest)
        step = self._power(x) * 2.0**-self.mantissa_bits  # distance of neighbours at |x|
        return jnp.rint(x / step) * step

    def encode(self, x: jax.Array) -> jax.Array:
        """Bit patterns of the nearest values: sign, exponent field, mantissa; as int32."""
        x = self.round(x)
        power = self._power(x)
        field = jnp.frexp(power)[1] - 1 - self.smallest_exponent
        # The implicit bit of a normal number carries into the exponent field.
        mantissa = (jnp.abs(x) / power * 2.0**self.mantissa_bits).astype(jnp.int32)
        return (field << self.mantissa_bits) + mantissa + jnp.where(x < 0, 1 << (self.bits - 1), 0)

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of bit patterns."""
        table = np.arange(2**self.bits, dtype=np.uint8).view(self.dtype).astype(np.float32)
        return jnp.asarray(table)[codes.astype(jnp.int32)]


E2M1 = Float.of(ml_dtypes.float4_e2m1fn)
E4M3 = Float.of(ml_dtypes.float8_e4m3fn)
E5M2 = Float.of(ml_dtypes.float8_e5m2)


def _block_float(name, bits, layout, element: Float, find_scale) -> Quantizer:
    def encode(w_GKO, scale, zero):
        del zero
        return element.encode(w_GKO / scale)

    def decode(codes, scale, zero):
        del zero
        return scale * element.decode(codes)

    def nearest(w_GKO, scale, zero):
        del zero
        return scale * element.round(w_GKO / scale)

    def within(w_GKO, scale, zero):
        del zero
        return jnp.abs(w_GKO / scale) <= element.largest

    def find_grid(w_GKO):
        return find_scale(layout.reduce(jnp.max, jnp.abs(w_GKO))), None

    coding = Coding(encode, decode, 2**element.bits, nearest)
    return from_data(name, bits, layout, coding, find_grid, within)


def mxfp4(
    bits: float = 4, *, scale_rounding: str = "floor", **layout: Unpack[LayoutOptions]
) -> Quantizer:
    """E2M1 values {0, .5, 1, 1.5, 2, 3, 4, 6} and sign, a power-of-two scale for 32 inputs.

      s = 2^(floor(log2(max |w|)) - 2)   ("floor": OCP MX 1.0, section 6.3, from memory)
      s = 2^ceil(log2(max |w| / 6))      ("ceil": nothing saturates; qwix 0.1.8)
      w_q = s * E2M1(w / s), rounding half to even;   d w_q / d w = 1

    With "floor" weights between 6 s and 8 s saturate at 6 s. Which of the two training papers mean
    is unconfirmed, hence the flag.

    Args:
      bits: 4.
      scale_rounding: "floor" or "ceil".
      **layout: groups of 32 by default, as in the standard; no groups are no MX format but have
        the same formulas.
    """
    if scale_rounding not in ("floor", "ceil"):
        raise ValueError(f'scale_rounding must be "floor" or "ceil"; got {scale_rounding!r}')
    layout = make_layout("mxfp4", bits, (4,), **(_GROUPS_OF_32 | layout))

    def find_scale(largest):
        fraction, exponent = jnp.frexp(largest)  # fraction in [0.5, 1), exactly: no logarithm
        # largest / 6 = (fraction * 4/3) * 2^(exponent - 3), and fraction * 4/3 is in [2/3, 4/3).
        above = exponent - 3 + (fraction > 0.75)
        exponent = exponent - 3 if scale_rounding == "floor" else above
        exponent = jnp.clip(exponent, _SMALLEST_EXPONENT, 127)
        return jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), exponent), 1.0)

    return _block_float("mxfp4", bits, layout, E2M1, find_scale)


def nvfp4(
    bits: float = 4, *, tensor_scale: bool = True, **layout: Unpack[LayoutOptions]
) -> Quantizer:
    """E2M1 values with an E4M3 scale for 16 inputs and a float32 scale for the matrix.

      t = max |W| / (6 * 448),   s = t * E4M3(max |w| / (6 t)),   w_q = s * E2M1(w / s)
      d w_q / d w = 1

    The scale of the matrix is that of NVIDIA's training recipe (arXiv 2509.25149, from memory);
    `tensor_scale=False` sets t = 1, as qwix 0.1.8 does. Blocks whose scale rounds down saturate by
    up to 1/16; a scale that rounds to 0 is raised to the smallest of E4M3, 2^-9.

    Args:
      bits: 4.
      tensor_scale: whether the matrix has a scale besides those of the blocks.
      **layout: groups of 16 by default, as in the format; no groups are no NVFP4 but have the same
        formulas.
    """
    layout = make_layout("nvfp4", bits, (4,), **(_GROUPS_OF_16 | layout))

    def find_scale(largest):
        outer = jnp.float32(1)
        if tensor_scale:
            matrix = jnp.max(largest, axis=(-3, -2, -1), keepdims=True)
            outer = usable(matrix / (E2M1.largest * E4M3.largest))
        inner = E4M3.round(largest / (E2M1.largest * outer))
        return outer * jnp.maximum(inner, 2.0**-9)

    return _block_float("nvfp4", bits, layout, E2M1, find_scale)


def fp8_e4m3(bits: float = 8, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """w_q = s * E4M3(w / s), s = max |w| / 448 in float32; d w_q / d w = 1.

    Args:
      bits: 8.
    """
    return _fp8("fp8_e4m3", bits, layout, E4M3)


def fp8_e5m2(bits: float = 8, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """w_q = s * E5M2(w / s), s = max |w| / 57344 in float32; d w_q / d w = 1.

    Args:
      bits: 8.
    """
    return _fp8("fp8_e5m2", bits, layout, E5M2)


def _fp8(name, bits, layout, element: Float) -> Quantizer:
    layout = make_layout(name, bits, (8,), **layout)
    return _block_float(
        name, bits, layout, element, lambda largest: usable(largest / element.largest)
    )
