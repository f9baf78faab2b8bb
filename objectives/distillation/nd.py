"""Norm and direction of hidden states, taught by those of a teacher.

B batch, T length, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.distillation.taught import Comparison, taught_statistics
from objectives.losses.base import Inputs, Loss
from objectives.vocabulary import first_column, total
from objectives.weighting.base import check_number


def nd(factor: float = 2.0, kd: float = 1.0, temperature: float = 1.0) -> Loss:
    """l = -log p_y + kd T^2 KL(q || p) + factor (1 - s . e_y / max(|s|, |t|)).

    The ND loss of KD++ (released code: WangYZ1608/Knowledge-Distillation-via-ND). s and t are the
    hidden states of student and teacher in front of the head, e_y is the unit vector of the centre
    of the class: s is to point there and to be no shorter than t. It is 0 where s = t = c e_y. The
    divergence is at the temperature T. With factor = 0 and kd = 0 it is cross-entropy.

    OURS: the paper's centres are means of the teacher's features of a class of images. Here the
    class is the next token, and e_y the column of the teacher's head that belongs to it.
    The released code lets kd grow to its value over the first epochs, which is not here.

    The teacher must have the student's width.

    Args:
      factor: of the ND loss, at least 0; 2 in KD++, 4 in DKD++.
      kd: factor of the divergence, at least 0; 1 in the released code.
      temperature: T of the divergence, above 0; 4 in the released code, for images.

    Raises:
      ValueError: a number out of its bounds.
    """
    check_number("factor", factor, least=0)
    check_number("kd", kd, least=0)
    check_number("temperature", temperature, above=0)
    comparison = Comparison(temperature=temperature)

    def statistics(inputs):
        found, divergence_BT, *_ = taught_statistics(inputs, comparison)
        loss_BT = found.nll + kd * temperature**2 * divergence_BT
        teacher = lax.stop_gradient(inputs.teachers["teacher"].hidden)
        apart_BT = norm_and_direction(inputs.hidden, teacher, centres(inputs))
        if inputs.axis:  # Every device has found the same, and contributes to the gradient.
            apart_BT = lax.pmean(apart_BT, inputs.axis)
        return found._replace(other_loss=loss_BT + factor * apart_BT)

    return Loss(statistics=statistics, teachers=("teacher",), same_width=True)


def norm_and_direction(
    student_BTD: jax.Array, teacher_BTD: jax.Array, centres_BTD: jax.Array
) -> jax.Array:
    """1 - s . e / max(|s|, |t|), [B, T] float32; the centres are unit vectors e."""
    student_BTD, teacher_BTD = (x.astype(jnp.float32) for x in (student_BTD, teacher_BTD))
    # Before any arithmetic: 0 * NaN is NaN, and a token without weight passes nothing.
    bad_BT = ~jnp.isfinite(student_BTD * teacher_BTD * centres_BTD).all(-1)
    student_BTD = jnp.where(bad_BT[..., None], 0, student_BTD)
    along_BT = jnp.sum(student_BTD * jnp.where(bad_BT[..., None], 0, centres_BTD), axis=-1)
    longest_BT = jnp.maximum(_norm(student_BTD), jnp.where(bad_BT, 1.0, _norm(teacher_BTD)))
    return jnp.where(bad_BT, jnp.nan, 1 - along_BT / longest_BT)


def centres(inputs: Inputs) -> jax.Array:
    """The unit vector of the column of the teacher's head for each target, [B, T, D] float32."""
    head_DV = lax.stop_gradient(inputs.teachers["teacher"].head)
    ids_BT = inputs.targets - first_column(head_DV, inputs.axis)
    here_BT = (ids_BT >= 0) & (ids_BT < head_DV.shape[1])
    columns_DBT = jnp.take(head_DV, ids_BT, axis=1, mode="clip").astype(jnp.float32)
    columns_BTD = jnp.where(here_BT[..., None], jnp.moveaxis(columns_DBT, 0, -1), 0.0)
    columns_BTD = total(columns_BTD, inputs.axis)
    return columns_BTD / _norm(columns_BTD)[..., None]


def _norm(x_BTD):
    # The root has no derivative at 0, which is what a token of weight 0 is.
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x_BTD), axis=-1), 1e-24))
