"""Distillation of a teacher's distribution with its probabilities clipped."""

import functools
import math

import jax.numpy as jnp

from objectives.distillation.divergences import FORWARD
from objectives.distillation.taught import (
    Comparison,
    statistics_of_teacher,
    taught_statistics,
)
from objectives.losses.base import Loss
from objectives.weighting.base import check_number


def dac_kl(lower: float = 0.0, upper: float = 1.0) -> Loss:
    """l = KL(q' || p), q' proportional to the teacher's q with every entry in [lower, upper].

    After the clipping of "Multi-Granularity Semantic Revision" (arXiv 2407.10068). lower = 0 and
    upper = 1 clip nothing, and are distillation with the forward divergence.

    UNCONFIRMED: in the paper a small network predicts both bounds as quantiles of q, by an equation
    that was not available; here they are two probabilities, off by default, and that q' is
    normalised again is ours. Its span term, on products of the distributions of adjacent tokens,
    and its generation from corrected positions are not here.

    Args:
      lower: smallest probability of a token under the teacher, in [0, 1]; 0 is off.
      upper: largest one, above `lower` and at most 1; 1 is off.

    Raises:
      ValueError: a number out of its bounds.
    """
    check_number("lower", lower, least=0, most=1)
    check_number("upper", upper, above=lower, most=1)
    off = lower == 0 and upper == 1
    comparison = Comparison() if off else Comparison(FORWARD, compose=_clipped(lower, upper))

    def statistics(inputs):
        constants = () if off else statistics_of_teacher(inputs).logsumexp
        found, divergence_BT, *_ = taught_statistics(inputs, comparison, constants)
        return found._replace(other_loss=divergence_BT)

    return Loss(statistics=statistics, teachers=("teacher",))


@functools.cache
def _clipped(lower: float, upper: float):
    least = math.log(lower) if lower else -jnp.inf

    def compose(logits, logsumexp_BT):
        (u_BTK,) = logits
        return jnp.clip(u_BTK - logsumexp_BT[..., None], least, math.log(upper))

    return compose
