"""Distillation from the largest probabilities of a teacher, which were stored once.

B batch, T length, V vocabulary, S stored entries of a token.
"""

import jax
import jax.numpy as jnp

from objectives.distillation.selected import Selected, selected_statistics
from objectives.losses.base import Loss
from objectives.vocabulary import vocabulary_size
from objectives.weighting.base import check_number

REFERENCE, IDS, LOG_PROBABILITIES = "teacher_top_k", "teacher_ids", "teacher_log_probabilities"


def top_k_distillation(rest: bool = True, share: float = 1.0) -> Loss:
    """l = share KL(q || p) + (1 - share) (-log p_y), q the teacher on its largest entries.

    With `rest`, the distributions are over the S stored entries and one more outcome, "any other":

      KL(q || p) = sum_s q_s log(q_s / p_s) + q_r log(q_r / p_r),  q_r = 1 - sum_s q_s,  p_r alike,

    which is at most the divergence of the whole distributions, and is it where S = V. Without
    `rest` both are renormalised over the S entries, and what the student gives to all others has no
    gradient. Nats. p_r is summed from its own logits (`selected_statistics`).

    Knowledge distillation (arXiv 1503.02531) at temperature 1 from logits that are stored, as one
    forward pass of the teacher serves all runs. Other temperatures need logits that are not stored.

    Needs the reference "teacher_top_k" (`launch.score --name=teacher_top_k`): "teacher_ids", int32
    [B, T, S], and "teacher_log_probabilities", float32 [B, T, S], of the whole softmax of the
    teacher, so that q_r is known. An id outside of the vocabulary or a probability that is NaN
    makes the loss of the token NaN.

    Args:
      rest: whether all other entries count as one outcome, or as none.
      share: of the divergence; 1 is the divergence alone, 0 is cross-entropy.

    Raises:
      ValueError: a share outside of [0, 1].
    """
    check_number("share", share, least=0, most=1)

    def statistics(inputs):
        ids_BTS, log_q_BTS = inputs.stored[IDS], inputs.stored[LOG_PROBABILITIES]
        found, selected = selected_statistics(inputs, ids_BTS)
        if rest:
            whole = ids_BTS.shape[-1] >= vocabulary_size(inputs.head, inputs.axis)
            loss_BT = _with_rest(log_q_BTS, selected, found.logsumexp, whole)
        else:
            loss_BT = _renormalised(log_q_BTS, selected.logits)
        if share < 1:
            loss_BT = share * loss_BT + (1 - share) * found.nll
        return found._replace(other_loss=loss_BT)

    return Loss(statistics=statistics, references=(REFERENCE,), batch_keys=(IDS, LOG_PROBABILITIES))


def _with_rest(log_q_BTS, selected: Selected, logsumexp_BT, whole: bool) -> jax.Array:
    divergence_BT = _divergence(log_q_BTS, selected.logits - logsumexp_BT[..., None])
    if whole:
        return divergence_BT
    q_BT = jnp.maximum(1.0 - jnp.exp(log_q_BTS).sum(-1), 0.0)
    some_BT = q_BT > 0
    log_p_BT = jnp.where(some_BT, selected.rest - logsumexp_BT, 0.0)
    return divergence_BT + q_BT * (jnp.log(jnp.where(some_BT, q_BT, 1.0)) - log_p_BT)


def _renormalised(log_q_BTS, logits_BTS) -> jax.Array:
    return _divergence(jax.nn.log_softmax(log_q_BTS), jax.nn.log_softmax(logits_BTS))


def _divergence(log_q_BTS, log_p_BTS) -> jax.Array:
    """sum_s q_s log(q_s / p_s); an entry with q = 0 adds 0."""
    none_BTS = log_q_BTS == -jnp.inf
    difference_BTS = jnp.where(none_BTS, 0.0, log_q_BTS - log_p_BTS)
    return jnp.sum(jnp.exp(log_q_BTS) * difference_BTS, -1)
