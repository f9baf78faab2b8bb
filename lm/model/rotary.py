"""Rotary positions (arXiv 2104.09864).

B batch, T length, N heads, H head width.
"""

import jax
import jax.numpy as jnp

from lm.model import xla_cpu


def rope_angles(
    positions_BT: jax.Array, head_width: int, base: float
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of the angles position * base^(-2i/H), i from 0 to H/2 - 1.

    Args:
      positions_BT: int32, of each token in its document.
      head_width: H, even.
      base: the longest wavelength is 2 pi base^(1 - 2/H).

    Returns:
      Two float32 arrays [B, T, H/2].
    """
    half = head_width // 2
    frequencies_H = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTH = positions_BT[..., None] * frequencies_H

    def sine_and_cosine(angle_BTH):
        return jnp.sin(angle_BTH), jnp.cos(angle_BTH)

    # Every head, and every pass that rotates queries, keys or their gradients, reads them.
    return xla_cpu.computed_once(sine_and_cosine, angle_BTH, positions_BT)


def rotate(x_BNTH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array) -> jax.Array:
    """Rotates the channel pairs (i, i + H/2) of every head by their angles (equation 34).

    Args:
      x_BNTH: queries or keys.
      sin_BTH, cos_BTH: of `rope_angles`, [B, T, H/2].

    Returns:
      An array like x, in its dtype.
    """
    a, b = jnp.split(x_BNTH, 2, axis=-1)
    sin, cos = (f[:, None].astype(x_BNTH.dtype) for f in (sin_BTH, cos_BTH))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
