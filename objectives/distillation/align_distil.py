"""AlignDistil: the teacher is an extrapolation from two models, further where they differ more.

B batch, T length, K one block of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from objectives.distillation.divergences import REVERSE
from objectives.distillation.taught import (
    Comparison,
    statistics_of_teacher,
    taught_statistics,
)
from objectives.losses.base import Inputs, Loss
from objectives.terms import times
from objectives.vocabulary import for_each_block, total
from objectives.weighting.base import check_number

# Added to the extrapolation, as in the released code.
_LEAST = 1e-3


def align_distil(
    beta: float = 0.1, beta2: float = 10.0, temperature: float = 1.0, adaptive: bool = True
) -> Loss:
    """l = c KL(p || softmax(z* / T)), z* a line through the logits of two frozen models.

    AlignDistil (released code: songmzhang/AlignDistil). With z_a of the `teacher`, trained by DPO,
    and z_b of the `contrast_teacher`, trained by DPO with the preferences turned round,

      adaptive    z* = z_a + w (z_a - z_b), w = beta2 sum_v |p_a - p_b| + 0.001, c = beta / w
      otherwise   z* = (beta / beta2) z_a + (1 - beta / beta2) z_b, c = beta2

    where z_b of the second line is that of the model that DPO began with. w is of the token and not
    differentiated. Models that agree give z* = z_a. The released code can divide by the length of
    the answer: objective.normalisation=sequence.

    Three passes over the vocabulary for the teachers, one for the student; two without `adaptive`.

    Args:
      beta: of the DPO that made the teacher, above 0.
      beta2: strength of the extrapolation, above 0; 10 on given answers, 15 on the student's own.
      temperature: T, that z* alone is divided by, above 0.
      adaptive: extrapolate by the difference of both models at the token.

    Raises:
      ValueError: a number out of its bounds.
    """
    for name, value in (("beta", beta), ("beta2", beta2), ("temperature", temperature)):
        check_number(name, value, above=0)
    line = _extrapolated(temperature) if adaptive else _mixed(beta / beta2, temperature)
    comparison = Comparison(REVERSE, compose=line)

    def statistics(inputs):
        if not adaptive:
            found, divergence_BT, *_ = taught_statistics(inputs, comparison)
            return found._replace(other_loss=beta2 * divergence_BT)
        w_BT = beta2 * distance(inputs) + _LEAST
        found, divergence_BT, *_ = taught_statistics(inputs, comparison, w_BT)
        return found._replace(other_loss=times(beta / w_BT, divergence_BT))

    return Loss(statistics=statistics, teachers=("teacher", "contrast_teacher"))


@functools.cache
def _extrapolated(temperature: float):
    def compose(logits, w_BT):
        a_BTK, b_BTK = logits
        return (a_BTK + w_BT[..., None] * (a_BTK - b_BTK)) / temperature

    return compose


@functools.cache
def _mixed(share: float, temperature: float):
    def compose(logits, constants):
        del constants
        a_BTK, b_BTK = logits
        return (share * a_BTK + (1 - share) * b_BTK) / temperature

    return compose


def distance(inputs: Inputs) -> jax.Array:
    """sum_v |p_a - p_b| of the two teachers of the inputs, [B, T] in [0, 2], not differentiated."""
    names = tuple(inputs.teachers)
    normalisers = {name: statistics_of_teacher(inputs, name).logsumexp for name in names}

    def probabilities(name, head_DK):
        hidden_BTD, _, scores = inputs.teachers[name]
        return jnp.exp(scores.logits(hidden_BTD, head_DK) - normalisers[name][..., None])

    def add_block(sum_BT, heads, start):
        del start
        p_BTK, q_BTK = (probabilities(name, heads[name]) for name in names)
        block_BT = jnp.abs(p_BTK - q_BTK).sum(-1)
        return block_BT if sum_BT is None else sum_BT + block_BT

    heads = {name: inputs.teachers[name].head for name in names}
    found = for_each_block(heads, inputs.block_size, add_block, None)
    return lax.stop_gradient(total(found, inputs.axis))
