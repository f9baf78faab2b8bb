"""Grids of integers times a scale, as files of other programs hold them.

L layers, I inputs, O outputs, G groups of inputs.
"""

from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lm.compression.packed import Coded
from lm.errors import InputError
from objectives.quantization import Grid, Mixed

SCALES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class IntegerGrid(NamedTuple):
    """Weights scale * codes, or scale * codes + minimum.

    Attributes:
      codes_LIO: int8, symmetric about 0 or with one more below it; uint8 with a minimum.
      scale_LGO: float32; G is 1 where an output channel has one scale.
      minimum_LGO: float32, of asymmetric grids; None for symmetric ones.
    """

    codes_LIO: np.ndarray
    scale_LGO: np.ndarray
    minimum_LGO: np.ndarray | None = None


def integer_grid(path: str, coded: Coded) -> IntegerGrid:
    """The integers and scales of a quantized matrix.

    Raises:
      InputError: its values are not a scale times the integers around 0.
    """
    if isinstance(coded.quantizer, Mixed):
        return _stacked([integer_grid(path, layer) for layer in coded.layers()])
    values, q = levels(coded), coded.quantizer
    step, zero = _step(values), coded.grid.zero
    whole = np.round(values / step)
    integers = np.array_equal(whole, np.arange(whole.min(), whole.max() + 1))
    if not integers or len(coded.exact_zeros) or (zero is None and whole.min() > -1):
        raise InputError(
            f"{path} is on the grid of {q.name} with {q.bits:g} bits, which is not a scale times "
            "the integers around 0; valid: --quantizer=absmax, minmax, or ternary with 1.58 bits"
        )
    if zero is not None:
        scale = np.asarray(coded.grid.scale, np.float32)
        return IntegerGrid(np.asarray(coded.codes), scale, -scale * np.asarray(zero, np.float32))
    codes = whole.astype(np.int8)[np.asarray(coded.codes)]
    scale = np.asarray(coded.grid.scale, np.float32)
    one = np.float32(step) * scale if step != 1 else scale
    if q.granularity == "tensor":
        one = np.broadcast_to(one, (*one.shape[:-1], codes.shape[-1]))
    return IntegerGrid(codes, one)


def _stacked(layers: list[IntegerGrid]) -> IntegerGrid:
    """One grid of the layers' grids."""
    codes, scale, minimum = zip(*layers, strict=True)
    return IntegerGrid(
        np.stack(codes), np.stack(scale), None if minimum[0] is None else np.stack(minimum)
    )


def round_scales(coded: Coded, dtype: str) -> Coded:
    """The same codes with scales of which the value of one step is a number of `dtype`.

    What is decoded is then exactly what a file with scales of that type holds. Of an asymmetric
    grid the minimum, -scale * zero, is such a number, too: the scale loses the bits of the zero.
    """
    if isinstance(coded.quantizer, Mixed):
        scales = [round_scales(layer, dtype).grid.scale for layer in coded.layers()]
        return coded._replace(grid=coded.grid._replace(scale=jnp.stack(scales)))
    if coded.grid.zero is not None:
        return coded._replace(grid=coded.grid._replace(scale=_asymmetric(coded.grid, dtype)))
    kind, step = SCALES[dtype], np.float32(_step(levels(coded)))
    scale = np.asarray(coded.grid.scale, np.float32)
    wanted = (scale * step).astype(kind).astype(np.float32)
    rounded = wanted / step
    # A quotient may be one bit off the number that gives the product.
    for neighbour in (np.nextafter(rounded, 0), np.nextafter(rounded, np.float32(np.inf))):
        rounded = np.where(rounded * step == wanted, rounded, neighbour.astype(np.float32))
    return coded._replace(grid=coded.grid._replace(scale=jnp.asarray(rounded)))


def _asymmetric(grid: Grid, dtype: str) -> jnp.ndarray:
    """Scales that are numbers of `dtype` with their products with the zeros, which are integers."""
    bits_of_zero = np.ceil(np.log2(np.abs(np.asarray(grid.zero)) + 1))
    bits = ml_dtypes.finfo(SCALES[dtype]).nmant + 1 - bits_of_zero
    mantissa, exponent = np.frexp(np.asarray(grid.scale, np.float32))
    rounded = np.ldexp(np.round(np.ldexp(mantissa, bits.astype(int))), exponent - bits.astype(int))
    return jnp.asarray(rounded.astype(np.float32))


def levels(coded: Coded) -> np.ndarray:
    """The values of all codes, float32 [levels], at a scale of 1 (and where 0 has code 0)."""
    q = coded.quantizer
    codes = jnp.arange(q.levels, dtype=jnp.uint8)[:, None]
    if q.contraction_axis == -1:
        codes = codes.T
    if q.granularity == "group":
        # A column of groups that each hold one code.
        codes = jnp.repeat(codes, q.group_size, axis=q.contraction_axis)
        one = jnp.ones((q.levels, 1) if q.contraction_axis == -2 else (1, q.levels))
    else:
        one = jnp.ones((1, 1))
    zero = None if coded.grid.zero is None else jnp.zeros_like(one)
    found = np.asarray(q.decode(codes, Grid(one, zero))).reshape(-1)
    return found[:: q.group_size] if q.granularity == "group" else found


def _step(levels: np.ndarray) -> float:
    """The smallest distance between 0 and another level."""
    sizes = np.abs(levels[np.isfinite(levels) & (levels != 0)])
    return float(sizes.min()) if sizes.size else 1.0
