"""Sums over the vocabulary that compare the logits of a student with those of a teacher.

B batch, T length, K one block of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from objectives.cross_entropy import Partial, block_statistics, finish, merge, merge_over
from objectives.vocabulary import total

# A logit that takes no part: its exponential is 0, and the difference of two of them is 0.
LEFT_OUT = -1e30


class Pair(NamedTuple):
    """Sums over a part of the vocabulary, of logits z of the student and u of the teacher.

    Both have their own largest logit there, m = max z and n = max u.
    """

    student: Partial
    teacher: Partial
    under_teacher: jax.Array  # sum_j exp(u_j - n) (u_j - z_j)
    under_student: jax.Array  # sum_j exp(z_j - m) (z_j - u_j)
    at_best: jax.Array  # the largest z_j of those with u_j = n


class Compared(NamedTuple):
    """Statistics of p = softmax(z) and q = softmax(u): float32 [B, T], in nats.

    Attributes:
      nll, logsumexp, entropy: of the student, as those of `TokenStatistics`.
      teacher_nll, teacher_logsumexp, teacher_entropy: the same of the teacher.
      forward: KL(q || p) = sum_j q_j (u_j - z_j) - logsumexp(u) + logsumexp(z).
      reverse: KL(p || q).
      agreement: 1 where the largest logit of both is that of the same token, else 0.
    """

    nll: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    teacher_nll: jax.Array
    teacher_logsumexp: jax.Array
    teacher_entropy: jax.Array
    forward: jax.Array
    reverse: jax.Array
    agreement: jax.Array


def block_pair(z_BTK: jax.Array, u_BTK: jax.Array, targets_BT: jax.Array) -> Pair:
    """The sums of one block; targets count from the block's first column."""
    student, teacher = block_statistics(z_BTK, targets_BT), block_statistics(u_BTK, targets_BT)
    exp_z_BTK = jnp.exp(z_BTK - student.maximum[..., None])
    exp_u_BTK = jnp.exp(u_BTK - teacher.maximum[..., None])
    is_best_BTK = u_BTK == teacher.maximum[..., None]
    at_best_BT = jnp.where(is_best_BTK, lax.stop_gradient(z_BTK), -jnp.inf).max(-1)
    return Pair(
        student,
        teacher,
        (exp_u_BTK * (u_BTK - z_BTK)).sum(-1),
        (exp_z_BTK * (z_BTK - u_BTK)).sum(-1),
        at_best_BT,
    )


def merge_pairs(a: Pair, b: Pair) -> Pair:
    """The sums over the union of two parts."""
    student, teacher = merge(a.student, b.student), merge(a.teacher, b.teacher)

    def add(x_a, x_b, of_a, of_b, maximum):
        return jnp.exp(of_a.maximum - maximum) * x_a + jnp.exp(of_b.maximum - maximum) * x_b

    return Pair(
        student,
        teacher,
        add(a.under_teacher, b.under_teacher, a.teacher, b.teacher, teacher.maximum),
        add(a.under_student, b.under_student, a.student, b.student, student.maximum),
        jnp.maximum(
            jnp.where(a.teacher.maximum == teacher.maximum, a.at_best, -jnp.inf),
            jnp.where(b.teacher.maximum == teacher.maximum, b.at_best, -jnp.inf),
        ),
    )


def merge_pairs_over(axis: str, part: Pair) -> Pair:
    """`merge_pairs` of the parts of all devices of a mapped axis."""
    student, teacher = merge_over(axis, part.student), merge_over(axis, part.teacher)
    under_teacher, under_student = total(
        (
            jnp.exp(part.teacher.maximum - teacher.maximum) * part.under_teacher,
            jnp.exp(part.student.maximum - student.maximum) * part.under_student,
        ),
        axis,
    )
    is_best = part.teacher.maximum == teacher.maximum
    at_best = lax.pmax(jnp.where(is_best, part.at_best, -jnp.inf), axis)
    return Pair(student, teacher, under_teacher, under_student, at_best)


def finish_pair(pair: Pair) -> Compared:
    """The statistics, from the sums over the whole vocabulary."""
    nll_BT, logsumexp_BT, entropy_BT = finish(pair.student)
    of_teacher = finish(pair.teacher)
    apart_BT = of_teacher[1] - logsumexp_BT
    agreement_BT = pair.at_best >= lax.stop_gradient(pair.student.maximum)
    return Compared(
        nll_BT,
        logsumexp_BT,
        entropy_BT,
        *of_teacher,
        pair.under_teacher / pair.teacher.sum_exp - apart_BT,
        pair.under_student / pair.student.sum_exp + apart_BT,
        agreement_BT.astype(jnp.float32),
    )
