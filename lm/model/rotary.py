"""Rotary positions (arXiv 2104.09864).

B batch, T length, N heads, H head width.
"""

import jax
import jax.numpy as jnp

from lm.model.platform import platform


def turns(positions_BT: jax.Array, head_width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of position * base^(-2i/H), float32 [B, T, H/2]."""
    half = head_width // 2
    frequencies_H = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTH = positions_BT[..., None] * frequencies_H

    def sine_and_cosine(angle_BTH):
        return jnp.sin(angle_BTH), jnp.cos(angle_BTH)

    if platform() != "cpu":
        return sine_and_cosine(angle_BTH)
    # XLA on CPU, which removes optimization barriers before it fuses, would compute sine and cosine
    # again for every head, in each elementwise pass that turns queries, keys or their gradients:
    # 1.15 x the time of a step. It fuses nothing out of a conditional, even of two like branches.
    return jax.lax.cond(positions_BT.min() >= 0, sine_and_cosine, sine_and_cosine, angle_BTH)


def rotate(x_BNTH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + H/2) by position * base^(-2i/H) (eq. 34).

    The sine and cosine are [B, T, H/2].
    """
    a, b = jnp.split(x_BNTH, 2, axis=-1)
    sin, cos = (f[:, None].astype(x_BNTH.dtype) for f in (sin_BTH, cos_BTH))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
