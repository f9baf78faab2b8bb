"""Rotary positions (arXiv 2104.09864), and how they are scaled to longer texts.

B batch, T length, N heads, H head width, R channels of a head that are rotated.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.model import xla_cpu


class Rope(NamedTuple):
    """Which frequencies a head is rotated by.

    Attributes:
      width: channels that are rotated, R, even.
      base: the longest wavelength is 2 pi base^(1 - 2/R), before scaling.
      scaling: "none"; "linear", all frequencies divided by the factor (arXiv 2306.15595); "llama3",
        those of long wavelengths only, as published with Llama 3.1.
      factor: of the scaling.
      low_frequency, high_frequency: llama3 only: wavelengths above original_length / low_frequency
        are scaled, those below original_length / high_frequency are kept.
      original_length: llama3 only: tokens of the texts before the scaling.
    """

    width: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192


def rope_angles(positions_BT: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of the angles position * base^(-2i/R), i from 0 to R/2 - 1, scaled.

    Args:
      positions_BT: int32, of each token in its document.
      rope: the frequencies.

    Returns:
      Two float32 arrays [B, T, R/2].
    """
    half = rope.width // 2
    frequencies_H = rope.base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if rope.scaling == "linear":
        frequencies_H = frequencies_H / rope.factor
    elif rope.scaling == "llama3":
        frequencies_H = _llama3(frequencies_H, rope)
    angle_BTH = positions_BT[..., None] * frequencies_H

    def sine_and_cosine(angle_BTH):
        return jnp.sin(angle_BTH), jnp.cos(angle_BTH)

    # Every head, and every pass that rotates queries, keys or their gradients, reads them.
    return xla_cpu.computed_once(sine_and_cosine, angle_BTH, positions_BT)


def _llama3(frequencies_H, rope: Rope):
    """Between the two wavelengths, a mean of the frequency and the scaled one."""
    turns_H = rope.original_length * frequencies_H / (2 * math.pi)  # in the original length
    share_H = (turns_H - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    share_H = jnp.clip(share_H, 0, 1)
    return (1 - share_H) * frequencies_H / rope.factor + share_H * frequencies_H


def rotate(x_BNTH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array) -> jax.Array:
    """Rotates the channel pairs (i, i + R/2) of every head by their angles (equation 34).

    Channels from R on stay as they are.

    Args:
      x_BNTH: queries or keys.
      sin_BTH, cos_BTH: of `rope_angles`, [B, T, R/2].

    Returns:
      An array like x, in its dtype.
    """
    half = sin_BTH.shape[-1]
    a, b, rest = jnp.split(x_BNTH, (half, 2 * half), axis=-1)
    sin, cos = (f[:, None].astype(x_BNTH.dtype) for f in (sin_BTH, cos_BTH))
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1)
