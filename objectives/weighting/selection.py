"""Keeping the highest scores: exact over the global batch, on any mesh.

Under `jax.jit` the arrays are global, so a count is a count over all devices. The threshold is
found bit by bit, 32 counts, with no sort and without gathering the scores on any device.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax


def check_share(name: str, value: float) -> None:
    """Raises ValueError, which starts with the hyper-parameter's name, unless 0 < value <= 1."""
    if not 0 < value <= 1 or not _fraction(value).numerator:
        raise ValueError(f"{name}={value} must be above 0 and at most 1 (1 keeps everything)")


def share_of(count: jax.Array, share: float) -> jax.Array:
    """ceil(share * count) in integers; share is taken to four decimal places.

    In float32 the product of 0.6 and 5 is above 3: its ceiling is one token too many.
    """
    part, whole = _fraction(share).as_integer_ratio()
    quotient, rest = count // whole, count % whole
    return part * quotient + (part * rest + whole - 1) // whole


def highest(score: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """Which entries of `mask` are among the ceil(share * count) highest scores.

    Entries that tie with the last one kept are all kept, so that the choice does not depend on
    the order of the batch.

    Args:
      score: float32, of any shape; no NaN where mask is true.
      mask: the entries to choose from, of the same shape.
      share: in (0, 1], four decimal places; 1 is `mask` itself.

    Returns:
      Booleans of the shape of `score`.
    """
    if share == 1:
        return mask
    keys = jnp.where(mask, ordered(score), 0)
    count = jnp.sum(mask, dtype=jnp.int32)
    wanted = share_of(count, share)

    def set_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above = jnp.sum(keys >= candidate, dtype=jnp.int32)
        return jnp.where(above >= wanted, candidate, threshold)

    threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros((), jnp.uint32))
    return mask & (keys >= threshold)


def _fraction(share: float) -> Fraction:
    return Fraction(share).limit_denominator(10_000)


def ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats; both zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))
