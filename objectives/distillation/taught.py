"""Statistics of a student and its divergence from a teacher, without an array of all logits.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.distillation.divergences import FORWARD, Divergence
from objectives.distillation.sums import (
    LEFT_OUT,
    Compared,
    block_pair,
    finish_pair,
    merge_pairs,
    merge_pairs_over,
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


def only_teacher(logits: tuple[jax.Array, ...], constants: Any) -> jax.Array:
    """The `compose` of one teacher: its logits as they are."""
    del constants
    (u_BTK,) = logits
    return u_BTK


class Comparison(NamedTuple):
    """What of student and teacher is compared; every field is a constant of the program.

    Attributes:
      divergence: of the student's distribution from the teacher's.
      temperature: that both logits are divided by.
      without_target: compare the distributions over all tokens but the target.
      compose: (logits [B, T, K] of each teacher, constants) -> logits of the one that is compared
        with. A function of a module or of a cache: it is part of a key of JAX's.
    """

    divergence: Divergence = FORWARD
    temperature: float = 1.0
    without_target: bool = False
    compose: Callable[..., jax.Array] = only_teacher

    @property
    def is_plain(self) -> bool:
        """Whether logits are compared as they are."""
        return self.temperature == 1 and not self.without_target


AS_THEY_ARE = Comparison()


class Taught(NamedTuple):
    """What a pass over the logits of student and teacher gives; nats, [B, T] float32.

    Attributes:
      statistics: of the student, with the reports on the teacher.
      divergence: of the comparison, differentiable as the statistics are.
      teacher: statistics of both as they are, which carry no gradient.
      compared: the same of the logits that are compared, at their temperature and without target.
    """

    statistics: TokenStatistics
    divergence: jax.Array
    teacher: Compared
    compared: Compared


class _Static(NamedTuple):
    comparison: Comparison
    student: Scores
    teachers: tuple[Scores, ...]
    block_size: int
    axis: str | None


def taught_statistics(
    inputs: Inputs, comparison: Comparison = AS_THEY_ARE, constants: Any = ()
) -> Taught:
    """Statistics of the student's distribution, and its divergence from the teacher's.

    One block of logits of each model exists at a time, forward and backward. A divergence that
    needs normalised probabilities takes a second pass forward. Value and gradient are exactly 0
    where both logits are the same numbers. The statistics and their gradients are those of
    `objectives.cross_entropy.token_statistics`, and so are the rules for weights of 0, for a
    block size of 0 and for a vocabulary that is spread over an axis. Nothing is differentiated in
    the teachers.

    The derivative in the student's logits is dD/dz_j = (w_j - p_j sum_i w_i) / temperature, see
    `objectives.distillation.divergences.Divergence`.

    Args:
      inputs: with the teachers that `comparison.compose` reads, in its order.
      comparison: what is compared.
      constants: tree of [B, T] arrays for `comparison.compose`, not differentiated.
    """
    hidden, head, scores = softmax(inputs)
    teachers = tuple(inputs.teachers.values())
    frozen = lax.stop_gradient(
        (tuple(t.hidden for t in teachers), tuple(t.head for t in teachers), constants)
    )
    static = _Static(
        comparison, scores, tuple(t.scores for t in teachers), inputs.block_size, inputs.axis
    )
    targets_BT = inputs.targets - first_column(head, inputs.axis)
    compute = _taught if inputs.block_size else _plain
    found, divergence_BT, teacher, compared = compute(static, hidden, head, targets_BT, frozen)
    teacher, compared = lax.stop_gradient((teacher, compared))
    statistics = TokenStatistics(
        *found,
        -found[0],
        teacher_divergence=teacher.forward,
        teacher_agreement=teacher.agreement,
    )
    return Taught(statistics, divergence_BT, teacher, compared)


def statistics_of_teacher(inputs: Inputs, name: str = "teacher") -> TokenStatistics:
    """Statistics of a teacher's own distribution, in a pass of its own; they carry no gradient."""
    hidden, head, scores = inputs.teachers[name]
    found = token_statistics(
        hidden,
        head,
        inputs.targets,
        scores=scores,
        block_size=inputs.block_size,
        axis=inputs.axis,
    )
    return lax.stop_gradient(found)


def _of_teacher(static, hiddens, heads, constants):
    """The logits that the student is compared with, [B, T, K]."""
    models = zip(static.teachers, hiddens, heads, strict=True)
    logits = tuple(scores.logits(hidden, head) for scores, hidden, head in models)
    return static.comparison.compose(logits, constants)


def _shaped(static, logits_BTK, targets_BT):
    """Logits as they are compared; targets count from the block's first column."""
    comparison = static.comparison
    if comparison.temperature != 1:
        logits_BTK = logits_BTK / comparison.temperature
    if comparison.without_target:
        is_target_BTK = targets_BT[..., None] == jnp.arange(logits_BTK.shape[-1])
        logits_BTK = jnp.where(is_target_BTK, LEFT_OUT, logits_BTK)
    return logits_BTK


def _block_sums(static, z_BTK, u_BTK, targets_BT):
    """Sums of the logits as they are, and, where these differ, of those that are compared."""
    as_they_are = block_pair(z_BTK, u_BTK, targets_BT)
    if static.comparison.is_plain:
        return (as_they_are,)
    z_BTK, u_BTK = (_shaped(static, x_BTK, targets_BT) for x_BTK in (z_BTK, u_BTK))
    return as_they_are, block_pair(z_BTK, u_BTK, targets_BT)


def _finish(static, sums) -> tuple[Compared, Compared]:
    """Statistics of the logits as they are, and of those that are compared."""
    if static.axis:
        sums = tuple(merge_pairs_over(static.axis, pair) for pair in sums)
    found = tuple(finish_pair(pair) for pair in sums)
    return found[0], found[-1]


def _logarithms(static, z_BTK, u_BTK, targets_BT, compared: Compared):
    """log p and log q of the distributions that are compared."""
    z_BTK, u_BTK = (_shaped(static, x_BTK, targets_BT) for x_BTK in (z_BTK, u_BTK))
    return (
        z_BTK - compared.logsumexp[..., None],
        u_BTK - compared.teacher_logsumexp[..., None],
    )


def _plain(static, hidden_BTD, head_DV, targets_BT, frozen):
    """All logits at once; the derivatives are JAX's own."""
    hiddens, heads, constants = frozen
    bad_BT = not_finite(static.student, hidden_BTD, head_DV, static.axis)
    for scores, states, head in zip(static.teachers, hiddens, heads, strict=True):
        bad_BT |= not_finite(scores, states, head, static.axis)

    def clean(x):
        return jnp.where(bad_BT[..., None], 0, x)

    # Both: the product has the gradient d logits @ head, and 0 * inf is NaN.
    z_BTV = clean(static.student.logits(clean(hidden_BTD), head_DV))
    u_BTV = clean(_of_teacher(static, tuple(map(clean, hiddens)), heads, constants))
    plain, compared = _finish(static, _block_sums(static, z_BTV, u_BTV, targets_BT))
    divergence = static.comparison.divergence
    if divergence.of_sums:
        divergence_BT, _ = divergence.of_sums(compared)
    else:
        logarithms = _logarithms(static, z_BTV, u_BTV, targets_BT, compared)
        divergence_BT = total(divergence.terms(*logarithms).sum(-1), static.axis)
    found = plain[:3], divergence_BT, plain, compared
    return jax.tree.map(lambda x_BT: jnp.where(bad_BT, jnp.nan, x_BT), found)


def _pass(static, hidden_BTD, head_DV, targets_BT, frozen):
    """(statistics of the logits as they are, of those compared, divergence, its sum of w)."""
    hiddens, heads, constants = frozen

    def logits(all_heads):
        head_DK, *of_teachers = all_heads
        return (
            static.student.logits(hidden_BTD, head_DK),
            _of_teacher(static, hiddens, of_teachers, constants),
        )

    def add_block(sums, all_heads, start):
        block = _block_sums(static, *logits(all_heads), targets_BT - start)
        if sums is None:
            return block
        return tuple(merge_pairs(a, b) for a, b in zip(sums, block, strict=True))

    all_heads = (head_DV, *heads)
    plain, compared = _finish(static, for_each_block(all_heads, static.block_size, add_block, None))
    divergence = static.comparison.divergence
    if divergence.of_sums:
        return plain, compared, *divergence.of_sums(compared)

    def add_terms(sums, all_heads, start):
        logarithms = _logarithms(static, *logits(all_heads), targets_BT - start, compared)
        block = tuple(f(*logarithms).sum(-1) for f in (divergence.terms, divergence.slopes))
        return block if sums is None else tuple(a + b for a, b in zip(sums, block, strict=True))

    sums = for_each_block(all_heads, static.block_size, add_terms, None)
    return plain, compared, *total(sums, static.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taught(static, hidden_BTD, head_DV, targets_BT, frozen):
    plain, compared, divergence_BT, _ = _pass(static, hidden_BTD, head_DV, targets_BT, frozen)
    return plain[:3], divergence_BT, plain, compared


def _forward(static, *arguments):
    arguments = jax.tree.map(lambda x: x.value, arguments)
    plain, compared, divergence_BT, slope_BT = _pass(static, *arguments)
    outputs = plain[:3], divergence_BT, plain, compared
    return outputs, (*arguments, plain, compared, slope_BT)


def _backward(static, residuals, cotangents):
    hidden_BTD, head_DV, targets_BT, frozen, plain, compared, slope_sum_BT = residuals
    hiddens, heads, constants = frozen
    (d_nll, d_logsumexp, d_entropy), d_divergence, *_ = cotangents
    through_entropy = not isinstance(d_entropy, SymbolicZero)
    d_nll_BT, d_logsumexp_BT, d_entropy_BT, d_divergence_BT = (
        jnp.zeros_like(plain.nll) if isinstance(cotangent, SymbolicZero) else cotangent
        for cotangent in (d_nll, d_logsumexp, d_entropy, d_divergence)
    )
    live_BT = (d_nll_BT != 0) | (d_logsumexp_BT != 0) | (d_entropy_BT != 0) | (d_divergence_BT != 0)
    first_hidden, hidden_BTD = hidden_BTD, jnp.where(live_BT[..., None], hidden_BTD, 0)
    d_probability_BT = d_nll_BT + d_logsumexp_BT
    if through_entropy:
        d_probability_BT -= d_entropy_BT * plain.entropy
    d_compared_BT = d_divergence_BT / static.comparison.temperature

    def add_block(gradients, all_heads, start):
        head_DK, *of_teachers = all_heads
        z_BTK = static.student.logits(hidden_BTD, head_DK)
        u_BTK = _of_teacher(static, hiddens, of_teachers, constants)
        log_p_BTK = z_BTK - plain.logsumexp[..., None]
        slope_BTK = d_probability_BT[..., None]
        if through_entropy:
            slope_BTK = slope_BTK - d_entropy_BT[..., None] * log_p_BTK
        is_target_BTK = (targets_BT - start)[..., None] == jnp.arange(head_DK.shape[1])
        dz_BTK = jnp.exp(log_p_BTK) * slope_BTK - jnp.where(is_target_BTK, d_nll_BT[..., None], 0)
        log_p_BTK, log_q_BTK = _logarithms(static, z_BTK, u_BTK, targets_BT - start, compared)
        w_BTK = static.comparison.divergence.slopes(log_p_BTK, log_q_BTK)
        w_BTK -= jnp.exp(log_p_BTK) * slope_sum_BT[..., None]
        dz_BTK += d_compared_BT[..., None] * w_BTK
        block = static.student.pull_back(hidden_BTD, head_DK, z_BTK, dz_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        (head_DV, *heads), static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(first_hidden.dtype), dhead_DV, None, None


_taught.defvjp(_forward, _backward, symbolic_zeros=True)
