"""Sums over the vocabulary of a function of both logits, which needs no normaliser.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from objectives.losses.base import Prediction, Teacher
from objectives.vocabulary import Scores, add_gradients, for_each_block, not_finite, total


class Summand(NamedTuple):
    """A function f(s, u) of a logit of the student and one of the teacher.

    Attributes:
      terms: (s [B, T, K], u) -> f.
      slopes: (s, u) -> df/ds.
    """

    terms: Callable[[jax.Array, jax.Array], jax.Array]
    slopes: Callable[[jax.Array, jax.Array], jax.Array]


class _Static(NamedTuple):
    summand: Summand
    student: Scores
    teacher: Scores
    block_size: int
    axis: str | None


def added_up(
    summand: Summand, student: Prediction, teacher: Teacher, block_size: int, axis: str | None
) -> jax.Array:
    """sum_v f(s_v, u_v), [B, T] float32, differentiable in the student.

    One block of logits of each exists at a time, forward and backward. The rules for weights of 0,
    for a block size of 0 and for a vocabulary that is spread over an axis are those of
    `objectives.cross_entropy.token_statistics`.
    """
    static = _Static(summand, student.scores, teacher.scores, block_size, axis)
    frozen = lax.stop_gradient((teacher.hidden, teacher.head))
    compute = _added_up if block_size else _plain
    return compute(static, student.hidden, student.head, frozen)


def _plain(static, hidden_BTD, head_DV, frozen):
    bad_BT = not_finite(static.student, hidden_BTD, head_DV, static.axis)
    bad_BT |= not_finite(static.teacher, *frozen, static.axis)

    def logits(scores, hidden, head):
        return jnp.where(
            bad_BT[..., None], 0, scores.logits(jnp.where(bad_BT[..., None], 0, hidden), head)
        )

    s_BTV = logits(static.student, hidden_BTD, head_DV)
    u_BTV = logits(static.teacher, *frozen)
    sum_BT = total(static.summand.terms(s_BTV, u_BTV).sum(-1), static.axis)
    return jnp.where(bad_BT, jnp.nan, sum_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _added_up(static, hidden_BTD, head_DV, frozen):
    of_teacher_BTD, its_head_DV = frozen

    def add_block(sum_BT, heads, start):
        del start
        s_BTK = static.student.logits(hidden_BTD, heads[0])
        u_BTK = static.teacher.logits(of_teacher_BTD, heads[1])
        block_BT = static.summand.terms(s_BTK, u_BTK).sum(-1)
        return block_BT if sum_BT is None else sum_BT + block_BT

    sum_BT = for_each_block((head_DV, its_head_DV), static.block_size, add_block, None)
    return total(sum_BT, static.axis)


def _forward(static, hidden_BTD, head_DV, frozen):
    return _added_up(static, hidden_BTD, head_DV, frozen), (hidden_BTD, head_DV, frozen)


def _backward(static, residuals, d_BT):
    first_hidden, head_DV, (of_teacher_BTD, its_head_DV) = residuals
    live_BT = d_BT != 0
    hidden_BTD = jnp.where(live_BT[..., None], first_hidden, 0)

    def add_block(gradients, heads, start):
        s_BTK = static.student.logits(hidden_BTD, heads[0])
        u_BTK = static.teacher.logits(of_teacher_BTD, heads[1])
        ds_BTK = d_BT[..., None] * static.summand.slopes(s_BTK, u_BTK)
        block = static.student.pull_back(hidden_BTD, heads[0], s_BTK, ds_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        (head_DV, its_head_DV), static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(first_hidden.dtype), dhead_DV, None


_added_up.defvjp(_forward, _backward)
