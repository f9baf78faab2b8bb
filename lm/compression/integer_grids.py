"""Grids of integers times a scale, as files of other programs hold them.

L layers, I inputs, O outputs, G groups of inputs.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lm.compression.packed import Coded
from lm.errors import InputError
from objectives.quantization import Grid

SCALES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class IntegerGrid(NamedTuple):
    """Weights scale * codes.

    Attributes:
      codes_LIO: int8, symmetric about 0 or with one more below it.
      scale_LGO: float32; G is 1 where an output channel has one scale.
    """

    codes_LIO: np.ndarray
    scale_LGO: np.ndarray


def integer_grid(path: str, coded: Coded) -> IntegerGrid:
    """The integers and scales of a quantized matrix.

    Raises:
      InputError: its values are not a scale times the integers around 0.
    """
    levels, q = _levels(coded), coded.quantizer
    step = _step(levels)
    whole = np.round(levels / step)
    symmetric = np.array_equal(whole, np.arange(whole.min(), whole.max() + 1))
    if not symmetric or coded.grid.zero is not None or len(coded.exact_zeros) or whole.min() > -1:
        raise InputError(
            f"{path} is on the grid of {q.name} with {q.bits:g} bits, which is not a scale times "
            "the integers around 0; valid: --quantizer=absmax, or ternary with 1.58 bits"
        )
    codes = whole.astype(np.int8)[np.asarray(coded.codes)]
    scale = np.asarray(coded.grid.scale, np.float32)
    one = np.float32(step) * scale if step != 1 else scale
    if q.granularity == "tensor":
        one = np.broadcast_to(one, (*one.shape[:-1], codes.shape[-1]))
    return IntegerGrid(codes, one)


def round_scales(coded: Coded, dtype: str) -> Coded:
    """The same codes with scales of which the value of one step is a number of `dtype`.

    What is decoded is then exactly what a file with scales of that type holds.
    """
    kind, step = SCALES[dtype], np.float32(_step(_levels(coded)))
    scale = np.asarray(coded.grid.scale, np.float32)
    wanted = (scale * step).astype(kind).astype(np.float32)
    rounded = wanted / step
    # A quotient may be one bit off the number that gives the product.
    for neighbour in (np.nextafter(rounded, 0), np.nextafter(rounded, np.float32(np.inf))):
        rounded = np.where(rounded * step == wanted, rounded, neighbour.astype(np.float32))
    return coded._replace(grid=coded.grid._replace(scale=jnp.asarray(rounded)))


def _levels(coded: Coded) -> np.ndarray:
    """The values of all codes at a scale of 1."""
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


def decoded(leaf: Any) -> np.ndarray:
    """A leaf as weights, whether it is quantized or not."""
    return np.asarray(leaf.decode() if isinstance(leaf, Coded) else leaf)
