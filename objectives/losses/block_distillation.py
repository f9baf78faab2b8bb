"""Distillation of a model with full attention into one whose attention is cut into blocks.

B batch, T length, K one block of the vocabulary.
"""

import jax.numpy as jnp
from jax import lax

from objectives.cross_entropy import token_statistics
from objectives.losses.base import Loss, softmax
from objectives.losses.expectation import expectation
from objectives.weighting.base import check_number


def block_distillation(block_length: int = 64) -> Loss:
    """l = KL(p_teacher || p), the teacher frozen and with full attention, p with blocks.

    After "Towards Generalization of Block Attention" (arXiv 2605.15913). Every document is cut
    into blocks of `block_length` tokens; a token sees its own block alone, and those of the last
    block see all. A document of one block is as before, and l = 0 where student and teacher are
    one. The validation loss is the student's, with its blocks; a prompt that is continued is a
    last block, and decoding hence as with full attention.

    UNCONFIRMED: the paper adds sink tokens, block dropout and token weights, which are not here;
    for the weights, in a form that is ours, there is the weighting `block_sensitive`.

    Args:
      block_length: tokens.

    Raises:
      ValueError: a `block_length` below 1.
    """
    check_number("block_length", block_length, least=1)

    def losses(inputs, statistics):
        hidden, head, scores = inputs.teacher
        hidden, head = lax.stop_gradient((hidden, head))
        of_teacher = token_statistics(
            hidden,
            head,
            inputs.targets,
            scores=scores,
            block_size=inputs.block_size,
            axis=inputs.axis,
        )

        def terms(carry, log_p_BTK, start, tokens, head_DK):
            hidden_BTD, logsumexp_BT = tokens
            log_q_BTK = scores.logits(hidden_BTD, head_DK) - logsumexp_BT[..., None]
            q_BTK = jnp.exp(log_q_BTK)
            return carry, q_BTK, jnp.sum(q_BTK * (log_q_BTK - log_p_BTK), axis=-1)

        return expectation(
            terms,
            softmax(inputs),
            statistics.logsumexp,
            (),
            (hidden, of_teacher.logsumexp),
            head,
            inputs.block_size,
            inputs.axis,
        )

    return Loss(losses=losses, teacher=True, block_length=block_length)
