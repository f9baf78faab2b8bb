"""Estimates of KL(policy || reference) at a token that was drawn from the policy.

With x = log p - log p_reference of the token, nats:

  k1  x                    unbiased; negative at times
  k2  x^2 / 2              biased; its gradient is that of the divergence, where drawn on-policy
  k3  exp(-x) - 1 + x      unbiased and never negative

In the loss, the gradient of k1 has the mean 0 on-policy: it restrains nothing. k1 belongs in the
reward.
"""

import jax
import jax.numpy as jnp

# exp of more is no float32 number worth having; the gradient is 0 there.
_LARGEST = 80.0


def k1(difference: jax.Array) -> jax.Array:
    """x."""
    return difference


def k2(difference: jax.Array) -> jax.Array:
    """x^2 / 2."""
    return jnp.square(difference) / 2


def k3(difference: jax.Array) -> jax.Array:
    """exp(-x) - 1 + x."""
    return jnp.expm1(jnp.minimum(-difference, _LARGEST)) + difference


ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}
