"""Normalised knowledge distillation: the target and all other tokens, each on its own."""

import jax.numpy as jnp

from objectives.distillation.divergences import FORWARD
from objectives.distillation.taught import Comparison, taught_statistics
from objectives.losses.base import Loss
from objectives.terms import times
from objectives.weighting.base import check_number


def nkd(gamma: float = 1.5, temperature: float = 1.0) -> Loss:
    """l = -t_y log s_y - gamma T^2 sum over v != y of t'_v log s'_v.

    NKD (arXiv 2303.13005, and its released code): s and t are the distributions of student and
    teacher, and s' and t' those over the tokens that are not the target, softmax(logits / T).
    The first term is cross-entropy with the weight t_y; the second does not vanish where s = t,
    but its gradient does. Forward, one pass over the vocabulary.

    One version of the released code has a mask that leaves the target in; here it is left out, as
    the paper says.

    Args:
      gamma: factor of the second term, at least 0; 1.5 at temperature 1, with other values for
        other pairs of models.
      temperature: T of the second term, above 0.

    Raises:
      ValueError: a number out of its bounds.
    """
    check_number("gamma", gamma, least=0)
    check_number("temperature", temperature, above=0)
    comparison = Comparison(FORWARD, temperature, without_target=True)

    def statistics(inputs):
        found, divergence_BT, teacher, compared = taught_statistics(inputs, comparison)
        target_BT = times(jnp.exp(-teacher.teacher_nll), found.nll)
        others_BT = divergence_BT + compared.teacher_entropy
        return found._replace(other_loss=target_BT + gamma * temperature**2 * others_BT)

    return Loss(statistics=statistics, teachers=("teacher",))
