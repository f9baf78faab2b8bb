"""Statistics of a student and its divergence from a teacher, in one pass over the vocabulary.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from objectives.cross_entropy import (
    Partial,
    TokenStatistics,
    block_statistics,
    finish,
    merge,
    merge_over,
)
from objectives.losses.base import Inputs, softmax
from objectives.vocabulary import (
    Scores,
    add_gradients,
    first_column,
    for_each_block,
    not_finite,
    total,
)


class _Static(NamedTuple):
    student: Scores
    teacher: Scores
    block_size: int
    axis: str | None


class _Teaching(NamedTuple):
    """Sums over a part of the vocabulary, relative to its largest logit m of the teacher."""

    maximum: jax.Array  # m
    sum_exp: jax.Array  # sum_j exp(u_j - m)
    cross: jax.Array  # sum_j exp(u_j - m) (u_j - z_j)


def taught_statistics(inputs: Inputs) -> tuple[TokenStatistics, jax.Array]:
    """Statistics of the student's distribution p, and KL(q || p) from the teacher's, q.

    With logits z of the student and u of the teacher, q = softmax(u), the divergence is

      KL(q || p) = sum_j q_j (u_j - z_j) - logsumexp(u) + logsumexp(z),   d KL / d z_j = p_j - q_j

    and exactly 0 where both logits are the same numbers. One block of logits of each model exists
    at a time, forward and backward. The statistics and their gradients are those of
    `objectives.cross_entropy.token_statistics`, and so are the rules for weights of 0, for a
    block size of 0 and for a vocabulary that is spread over an axis. Nothing is differentiated in
    the teacher.

    Args:
      inputs: with a teacher.

    Returns:
      The statistics, and the divergence in nats, [B, T] float32.
    """
    hidden, head, scores = softmax(inputs)
    of_teacher, its_head, its_scores = inputs.teacher
    of_teacher, its_head = lax.stop_gradient((of_teacher, its_head))
    targets_BT = inputs.targets - first_column(head, inputs.axis)
    static = _Static(scores, its_scores, inputs.block_size, inputs.axis)
    compute = _taught if inputs.block_size else _plain
    *found, divergence_BT = compute(static, hidden, head, targets_BT, of_teacher, its_head)
    return TokenStatistics(*found, -found[0]), divergence_BT


def _plain(static, hidden_BTD, head_DV, targets_BT, teacher_BTD, its_head_DV):
    """All logits at once; the derivatives are JAX's own."""
    bad_BT = not_finite(static.student, hidden_BTD, head_DV, static.axis)
    bad_BT |= not_finite(static.teacher, teacher_BTD, its_head_DV, static.axis)

    def logits(scores, states_BTD, matrix_DV):
        # Both: the product has the gradient d logits @ head, and 0 * inf is NaN.
        z_BTV = scores.logits(jnp.where(bad_BT[..., None], 0, states_BTD), matrix_DV)
        return jnp.where(bad_BT[..., None], 0, z_BTV)

    z_BTV = logits(static.student, hidden_BTD, head_DV)
    u_BTV = logits(static.teacher, teacher_BTD, its_head_DV)
    found = _finish(static, block_statistics(z_BTV, targets_BT), _block_teaching(z_BTV, u_BTV))[0]
    return tuple(jnp.where(bad_BT, jnp.nan, x_BT) for x_BT in found)


def _block_teaching(z_BTK, u_BTK) -> _Teaching:
    maximum_BT = u_BTK.max(-1)
    exp_BTK = jnp.exp(u_BTK - maximum_BT[..., None])
    return _Teaching(maximum_BT, exp_BTK.sum(-1), (exp_BTK * (u_BTK - z_BTK)).sum(-1))


def _merge_teaching(a: _Teaching, b: _Teaching) -> _Teaching:
    maximum = jnp.maximum(a.maximum, b.maximum)
    scale_a, scale_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    return _Teaching(
        maximum,
        scale_a * a.sum_exp + scale_b * b.sum_exp,
        scale_a * a.cross + scale_b * b.cross,
    )


def _finish(static, partial: Partial, teaching: _Teaching):
    """(nll, logsumexp, entropy, divergence) and the teacher's log-sum-exp."""
    if static.axis:
        partial = merge_over(static.axis, partial)
        maximum = lax.pmax(lax.stop_gradient(teaching.maximum), static.axis)
        scale = jnp.exp(teaching.maximum - maximum)
        sums = total((scale * teaching.sum_exp, scale * teaching.cross), static.axis)
        teaching = _Teaching(maximum, *sums)
    nll_BT, logsumexp_BT, entropy_BT = finish(partial)
    of_teacher_BT = jnp.log(teaching.sum_exp) + teaching.maximum
    divergence_BT = teaching.cross / teaching.sum_exp - of_teacher_BT + logsumexp_BT
    return (nll_BT, logsumexp_BT, entropy_BT, divergence_BT), of_teacher_BT


def _pass(static, hidden_BTD, head_DV, targets_BT, teacher_BTD, its_head_DV):
    def add_block(sums, heads, start):
        z_BTK = static.student.logits(hidden_BTD, heads[0])
        u_BTK = static.teacher.logits(teacher_BTD, heads[1])
        block = block_statistics(z_BTK, targets_BT - start), _block_teaching(z_BTK, u_BTK)
        if sums is None:
            return block
        return merge(sums[0], block[0]), _merge_teaching(sums[1], block[1])

    sums = for_each_block((head_DV, its_head_DV), static.block_size, add_block, None)
    return _finish(static, *sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taught(static, hidden_BTD, head_DV, targets_BT, teacher_BTD, its_head_DV):
    return _pass(static, hidden_BTD, head_DV, targets_BT, teacher_BTD, its_head_DV)[0]


def _forward(static, *arguments):
    arrays = [argument.value for argument in arguments]
    outputs, of_teacher_BT = _pass(static, *arrays)
    return outputs, (*arrays, outputs[1], outputs[2], of_teacher_BT)


def _backward(static, residuals, cotangents):
    hidden_BTD, head_DV, targets_BT, teacher_BTD, its_head_DV, *sums = residuals
    logsumexp_BT, entropy_BT, of_teacher_BT = sums
    through_entropy = not isinstance(cotangents[2], SymbolicZero)
    d_nll_BT, d_logsumexp_BT, d_entropy_BT, d_divergence_BT = (
        jnp.zeros_like(logsumexp_BT) if isinstance(cotangent, SymbolicZero) else cotangent
        for cotangent in cotangents
    )
    live_BT = (d_nll_BT != 0) | (d_logsumexp_BT != 0) | (d_entropy_BT != 0) | (d_divergence_BT != 0)
    hidden_BTD = jnp.where(live_BT[..., None], hidden_BTD, 0)
    d_probability_BT = d_nll_BT + d_logsumexp_BT + d_divergence_BT
    if through_entropy:
        d_probability_BT -= d_entropy_BT * entropy_BT

    def add_block(gradients, heads, start):
        head_DK, its_head_DK = heads
        z_BTK = static.student.logits(hidden_BTD, head_DK)
        u_BTK = static.teacher.logits(teacher_BTD, its_head_DK)
        log_p_BTK = z_BTK - logsumexp_BT[..., None]
        q_BTK = jnp.exp(u_BTK - of_teacher_BT[..., None])
        slope_BTK = d_probability_BT[..., None]
        if through_entropy:
            slope_BTK = slope_BTK - d_entropy_BT[..., None] * log_p_BTK
        is_target_BTK = (targets_BT - start)[..., None] == jnp.arange(head_DK.shape[1])
        dz_BTK = jnp.exp(log_p_BTK) * slope_BTK - d_divergence_BT[..., None] * q_BTK
        dz_BTK -= jnp.where(is_target_BTK, d_nll_BT[..., None], 0)
        block = static.student.pull_back(hidden_BTD, head_DK, z_BTK, dz_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        (head_DV, its_head_DV), static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(residuals[0].dtype), dhead_DV, None, None, None


_taught.defvjp(_forward, _backward, symbolic_zeros=True)
