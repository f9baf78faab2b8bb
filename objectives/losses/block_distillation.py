"""Distillation of a model with full attention into one with attention in blocks.

B batch, T length.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.distillation.taught import taught_statistics
from objectives.losses.base import Loss
from objectives.weighting.base import check_number

# The id of a last block, as `lm.model.attention` has it.
_LAST = -1


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
      block_length: tokens of a block, which attend to each other, at least 1.

    Raises:
      ValueError: a `block_length` below 1.
    """
    check_number("block_length", block_length, least=1)

    def statistics(inputs):
        taught = taught_statistics(inputs)
        return taught.statistics._replace(other_loss=taught.divergence)

    def attention_blocks(batch):
        return block_ids(batch["positions"], batch["segment_ids"], block_length)

    return Loss(statistics=statistics, teachers=("teacher",), attention_blocks=attention_blocks)


def block_ids(positions_BT: jax.Array, segment_ids_BT: jax.Array, length: int) -> jax.Array:
    """Blocks of `length` tokens, counted from the start of each document: int32 [B, T].

    The last block that a row has of a segment is -1, which sees all of the segment.

    Args:
      positions_BT: int32, of a token in its document.
      segment_ids_BT: int32, equal for the tokens of a document, which are contiguous.
      length: tokens of a block.
    """
    blocks_BT = positions_BT // length
    index_T = jnp.arange(positions_BT.shape[1])
    ends_BT = jnp.pad(
        segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True
    )
    end_BT = lax.cummin(jnp.where(ends_BT, index_T, index_T[-1]), axis=1, reverse=True)
    last_BT = jnp.take_along_axis(blocks_BT, end_BT, axis=1)
    return jnp.where(blocks_BT == last_BT, _LAST, blocks_BT)
