"""Inverted hinge loss: unlearn a token in favour of its strongest rival, within bounds.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.losses.base import Inputs, Loss, softmax
from objectives.vocabulary import first_column, for_each_block, total, vocabulary_size


def inverted_hinge() -> Loss:
    """l = 1 + p_y - max over v != y of p_v, in [0, 2].

    arXiv 2408.06621. It falls as the label loses to the runner-up: an objective for text
    that a model is to unlearn, without the unbounded descent of a negated cross-entropy. The
    gradient passes through all three probabilities. The hinge's clamp at 0 can never act.

    The runner-up is found in one more pass over the vocabulary. Where several tie, the gradient
    goes to the first.
    """

    def losses(inputs, statistics):
        rival_BT = rival_logits(inputs)
        return 1 + jnp.exp(statistics.log_probability) - jnp.exp(rival_BT - statistics.logsumexp)

    return Loss(losses=losses)


def rival_logits(inputs: Inputs) -> jax.Array:
    """The largest logit but for the target's, [B, T] float32, differentiable."""
    hidden_BTD, head_DV, scores = softmax(inputs)
    first, axis = first_column(head_DV, inputs.axis), inputs.axis
    fixed_BTD = lax.stop_gradient(hidden_BTD)

    def better(best, head_DK, start):
        logits_BTK = scores.logits(fixed_BTD, head_DK)
        is_target_BTK = (inputs.targets - first - start)[..., None] == jnp.arange(head_DK.shape[1])
        logits_BTK = jnp.where(is_target_BTK, -jnp.inf, logits_BTK)
        block = logits_BTK.max(-1), start + jnp.argmax(logits_BTK, axis=-1).astype(jnp.int32)
        if best is None:
            return block
        return tuple(jnp.where(block[0] > best[0], b, a) for a, b in zip(best, block, strict=True))

    best_BT, ids_BT = for_each_block(lax.stop_gradient(head_DV), inputs.block_size, better, None)
    if axis:
        is_best_BT = best_BT == lax.pmax(best_BT, axis)
        none = vocabulary_size(head_DV, axis)
        ids_BT = lax.pmin(jnp.where(is_best_BT, first + ids_BT, none), axis) - first
    rivals_DBT = jnp.take(head_DV, ids_BT, axis=1, mode="clip")
    logits_BT = jnp.einsum(
        "btd,dbt->bt", hidden_BTD, rivals_DBT, preferred_element_type=jnp.float32
    )
    if axis:
        here_BT = (ids_BT >= 0) & (ids_BT < head_DV.shape[1])
        logits_BT = total(jnp.where(here_BT, logits_BT, 0.0), axis)
    cap = inputs.softcap
    return cap * jnp.tanh(logits_BT / cap) if cap else logits_BT
