"""Powers of two without zero, +-2^S with S in 0..K: a product is a shift (DenseShift).

arXiv 2208.09708 and its official code (noah-research, S3-Training). The paper trains K + 1 latent
weights for every weight, without a scale, in front of batch norm: that is `sign_scale` below. The
quantizer `dense_shift` puts weights that exist on the same codes, with a scale.

    K        the largest shift, 2^(bits-1) - 1; latents are [K + 1, ...], sign first
    G, K, O  elsewhere: blocks, inputs in a block, output channels, see `base`
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from objectives.quantization.base import (
    Coding,
    LayoutOptions,
    Quantizer,
    check_bits,
    make_layout,
    power_below,
)
from objectives.quantization.data_scale import from_data, usable

_WIDTHS = (2, 3, 4)


def dense_shift(bits: float = 3, **layout: Unpack[LayoutOptions]) -> Quantizer:
    """The nearest of alpha * {+-1, +-2, ..., +-2^K}, K = 2^(bits-1) - 1, alpha = max |w| / 2^K.

      w_q = sgn(w) alpha 2^S,   S = sum_k [|w| / alpha > 1.5 * 2^k] for k in 0..K-1,   sgn(0) = 1
      d w_q / d w = 1

    There is no zero: weights below alpha grow to it. The codes are the paper's; the projection, its
    scale from the data and its straight-through gradient are ours (the paper says nothing of nets
    without batch norm), for post-training use and as a baseline of `sign_scale`.

    Args:
      bits: 2 to 4.
    """
    layout = make_layout("dense_shift", bits, _WIDTHS, **layout)
    largest = largest_shift(bits)

    def find_grid(w_GKO):
        return usable(layout.reduce(jnp.max, jnp.abs(w_GKO)) * 2.0**-largest), None

    def magnitude(w_GKO, scale):
        """2^S: the power of two on either side of |w| / alpha that is closer."""
        y_GKO = jnp.abs(w_GKO) / scale
        below = power_below(y_GKO)
        return jnp.clip(jnp.where(y_GKO > 1.5 * below, 2 * below, below), 1, 2.0**largest)

    def encode(w_GKO, scale, zero):
        del zero
        shift = jnp.frexp(magnitude(w_GKO, scale))[1] - 1
        return shift + jnp.where(w_GKO < 0, largest + 1, 0)

    def decode(codes, scale, zero):
        del zero
        codes = codes.astype(jnp.int32)
        powers = jnp.ldexp(scale, codes % (largest + 1))
        return jnp.where(codes > largest, -powers, powers)

    def nearest(w_GKO, scale, zero):
        del zero
        powers = scale * magnitude(w_GKO, scale)
        return jnp.where(w_GKO < 0, -powers, powers)

    coding = Coding(encode, decode, 2**bits, nearest)
    return from_data("dense_shift", bits, layout, coding, find_grid)


def largest_shift(bits: int) -> int:
    """K = 2^(bits-1) - 1, also the number of scale latents of a weight."""
    return 2 ** (bits - 1) - 1


def init_latents(key: jax.Array, shape: tuple[int, ...], bits: int) -> jax.Array:
    """Latents of `sign_scale`, [K + 1, *shape], each N(0, 1e-6) (the paper's low-variance start).

    At this start E|w| and E[w^2] are 2.5 and 11.5 at 3 bits, so a layer with n inputs keeps its
    variance if its output is multiplied by 1 / sqrt(11.5 n).
    """
    check_bits("dense_shift", bits, _WIDTHS)
    return 1e-3 * jax.random.normal(key, (largest_shift(bits) + 1, *shape))


@jax.custom_vjp
def sign_scale(latents: jax.Array) -> jax.Array:
    """The paper's reparameterisation: latents [K + 1, ...] -> weights +-2^S_K, [...].

      S_0 = 0,   S_k = (S_{k-1} + 1) H(latent_k) for k in 1..K,   w = sgn(latent_0) 2^(S_K)

    H(x) = [x > 0], sgn(0) = 1. The gradient is that of the surrogate sgn(latent_0) sqrt(S_K + 1),
    with the identity in place of the derivatives of H and sgn, and no clipping, as in the code.
    """
    sign, shift = _sign_and_shift(latents)
    return sign * jnp.ldexp(jnp.ones_like(sign), shift.astype(jnp.int32))


def _sign_and_shift(latents):
    shift = jnp.zeros_like(latents[0])
    for latent in latents[1:]:
        shift = (shift + 1) * (latent > 0)
    return jnp.where(latents[0] >= 0, 1.0, -1.0).astype(latents.dtype), shift


def _sign_scale_backward(latents, cotangent):
    sign, shift = _sign_and_shift(latents)
    root = jnp.sqrt(shift + 1)
    d_latents = [cotangent * root]
    before = [jnp.zeros_like(shift)]  # S_{k-1} of every k
    for latent in latents[1:-1]:
        before.append((before[-1] + 1) * (latent > 0))
    d_shift, of_scales = cotangent * sign / (2 * root), []
    for latent, previous in zip(latents[:0:-1], before[::-1], strict=True):
        of_scales.append(d_shift * (previous + 1))
        d_shift = d_shift * (latent > 0)
    return (jnp.stack(d_latents + of_scales[::-1]),)


sign_scale.defvjp(lambda latents: (sign_scale(latents), latents), _sign_scale_backward)
