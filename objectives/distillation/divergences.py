"""Divergences of a student's distribution p from a teacher's, q, as sums over the vocabulary.

B batch, T length, K one block of the vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.distillation.sums import Compared


class Divergence(NamedTuple):
    """D(p, q) in nats, exactly 0 and with a gradient of exactly 0 where both are the same numbers.

    With w_j = p_j dD/dp_j, where dD/dp_j counts up to a constant of the token, the gradient in the
    student's logits is dD/dz_j = w_j - p_j sum_i w_i.

    Attributes:
      slopes: (log p [B, T, K], log q) -> w, 0 where both are equal.
      of_sums: (`Compared`) -> (D, sum_j w_j), both [B, T], for a divergence that is known after the
        pass which finds the normalisers; None for one that takes a second pass, which adds up
        `terms` and `slopes`.
      terms: (log p, log q) -> summands of D, [B, T, K].
    """

    slopes: Callable[[jax.Array, jax.Array], jax.Array]
    of_sums: Callable[[Compared], tuple[jax.Array, jax.Array]] | None = None
    terms: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def forward_slopes(log_p_BTK: jax.Array, log_q_BTK: jax.Array) -> jax.Array:
    """w of KL(q || p): dD/dp_j is -q_j / p_j, to which the constant 1 is added."""
    return jnp.exp(log_p_BTK) - jnp.exp(log_q_BTK)


def reverse_slopes(log_p_BTK: jax.Array, log_q_BTK: jax.Array) -> jax.Array:
    """w of KL(p || q): dD/dp_j is log p_j - log q_j + 1, less the constant 1."""
    return jnp.exp(log_p_BTK) * (log_p_BTK - log_q_BTK)


FORWARD = Divergence(forward_slopes, lambda sums: (sums.forward, jnp.zeros_like(sums.forward)))
REVERSE = Divergence(reverse_slopes, lambda sums: (sums.reverse, sums.reverse))


def jensen_shannon(mixing: float) -> Divergence:
    """JSD_b = b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p.

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), q being the
    teacher. JSD_b / b goes to KL(q || p) for b to 0, and JSD_b / (1 - b) to KL(p || q) for b to 1.
    Its w is (1 - b) p (log p - log m).

    Args:
      mixing: b, in (0, 1).
    """

    def above_mixture(log_p_BTK, log_q_BTK):
        """log p - log m and log q - log m, both 0 where p is q."""
        apart_BTK = log_q_BTK - log_p_BTK
        # Relative to the larger of both, so that no exponential overflows.
        less_BTK = jnp.expm1(-jnp.abs(apart_BTK))
        share_BTK = jnp.where(apart_BTK > 0, 1 - mixing, mixing)
        of_larger_BTK = -jnp.log1p(share_BTK * less_BTK)
        of_smaller_BTK = of_larger_BTK - jnp.abs(apart_BTK)
        is_q_larger_BTK = apart_BTK > 0
        return (
            jnp.where(is_q_larger_BTK, of_smaller_BTK, of_larger_BTK),
            jnp.where(is_q_larger_BTK, of_larger_BTK, of_smaller_BTK),
        )

    def slopes(log_p_BTK, log_q_BTK):
        p_above_BTK, _ = above_mixture(log_p_BTK, log_q_BTK)
        return (1 - mixing) * jnp.exp(log_p_BTK) * p_above_BTK

    def terms(log_p_BTK, log_q_BTK):
        p_above_BTK, q_above_BTK = above_mixture(log_p_BTK, log_q_BTK)
        of_teacher_BTK = mixing * jnp.exp(log_q_BTK) * q_above_BTK
        return of_teacher_BTK + (1 - mixing) * jnp.exp(log_p_BTK) * p_above_BTK

    return Divergence(slopes, terms=terms)
