"""Distillation from a teacher of another tokenizer by its sorted probabilities.

B batch, T length, V vocabulary, S stored entries of a token.
"""

import jax
import jax.numpy as jnp

from objectives.distillation.ranking import top_tokens
from objectives.distillation.selected import selected_statistics
from objectives.losses.base import Loss, softmax
from objectives.weighting.base import check_number

REFERENCE = "teacher_sorted"


def uld(coefficient: float = 1.0, cross_entropy: float = 1.0) -> Loss:
    """l = cross_entropy (-log p_y) + coefficient sum_s |q_(s) - p_(s)|, the sum where both align.

    q_(1) >= q_(2) >= ... are the sorted probabilities of the teacher, p_(s) those of the student;
    the shorter list is filled up with zeros. This is the optimal transport between the two under a
    cost that is the same for all pairs of tokens, whatever the tokens are (universal logit
    distillation, arXiv 2402.12030). It lies in [0, 2].

    Truncated: only the S largest of each count, S as stored; with S of at least both vocabularies
    it is the whole distance. A position is aligned where both models have read the same text and
    neither has half a token of it: where the target begins on a byte boundary of both
    tokenizations. Elsewhere the distance is 0, and the mean is over all tokens. (The paper compares
    the i-th position of an answer with the i-th of the other.)

    UNCONFIRMED: the paper's coefficient. InfiGFusion adds a distance of graphs of logits, whose
    closed form and coefficients are not known; it is not here.

    Needs the reference "teacher_sorted" (`launch.score --name=teacher_sorted`), float32 [B, T, S],
    NaN where nothing aligns.

    Args:
      coefficient: of the distance, at least 0; 0 is cross-entropy.
      cross_entropy: of the negative log-likelihood, at least 0.

    Raises:
      ValueError: a negative coefficient.
    """
    check_number("coefficient", coefficient, least=0)
    check_number("cross_entropy", cross_entropy, least=0)

    def statistics(inputs):
        q_BTS = inputs.stored[REFERENCE]
        hidden, head, scores = softmax(inputs)
        _, ids_BTS = top_tokens(
            lambda head_DK, start: scores.logits(hidden, head_DK),
            head,
            q_BTS.shape[-1],
            inputs.block_size,
            inputs.axis,
        )
        found, selected = selected_statistics(inputs, ids_BTS)
        p_BTS = jnp.exp(selected.logits - found.logsumexp[..., None])
        distance_BT = _distance(q_BTS, p_BTS)
        return found._replace(other_loss=cross_entropy * found.nll + coefficient * distance_BT)

    return Loss(statistics=statistics, references=(REFERENCE,), batch_keys=(REFERENCE,))


def _distance(q_BTS: jax.Array, p_BTS: jax.Array) -> jax.Array:
    """sum_s |q - p|, the student's filled up with zeros; 0 where the teacher's are NaN."""
    p_BTS = jnp.pad(p_BTS, ((0, 0), (0, 0), (0, q_BTS.shape[-1] - p_BTS.shape[-1])))
    difference_BTS = jnp.where(jnp.isnan(q_BTS), 0.0, q_BTS - p_BTS)
    return jnp.sum(jnp.abs(difference_BTS), -1)
