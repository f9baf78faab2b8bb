"""The tokens of the largest scores, such as the likeliest ones of a distribution.

B batch, T length, D width, V vocabulary, K one block of the vocabulary, N tokens of a list.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from objectives.vocabulary import first_column, for_each_block, vocabulary_size


def top_tokens(
    score: Callable[[Any, jax.Array], jax.Array],
    heads: Any,
    count: int,
    block_size: int,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The tokens of the largest scores, in descending order; nothing is differentiated.

    Args:
      score: (block of `heads`, index of its first column in the whole vocabulary) -> [B, T, K].
      heads: tree of arrays [..., V].
      count: N, at most the size of the vocabulary.
      block_size: columns per block; 0 is all at once.
      axis: name of the axis that the vocabulary is spread over; None is whole.

    Returns:
      (scores float32 [B, T, N], ids int32 [B, T, N] in the whole vocabulary).
    """
    heads = lax.stop_gradient(heads)
    one = jax.tree.leaves(heads)[0]
    first = first_column(one, axis)
    count = min(count, vocabulary_size(one, axis))

    def largest(scores_BTJ, ids_BTJ):
        scores_BTN, places_BTN = lax.top_k(scores_BTJ, count)
        return scores_BTN, jnp.take_along_axis(ids_BTJ, places_BTN, axis=-1)

    def add_block(best, heads, start):
        scores_BTK = lax.stop_gradient(score(heads, first + start))
        ids_BTK = jnp.broadcast_to(
            first + start + jnp.arange(scores_BTK.shape[-1], dtype=jnp.int32), scores_BTK.shape
        )
        if best is None:  # A first block may have fewer tokens than are asked for.
            best = (
                jnp.full_like(scores_BTK[..., :1], -jnp.inf).repeat(count, -1),
                jnp.zeros_like(ids_BTK[..., :1]).repeat(count, -1),
            )
        both = zip(best, (scores_BTK, ids_BTK), strict=True)
        return largest(*(jnp.concatenate(pair, axis=-1) for pair in both))

    best = for_each_block(heads, block_size, add_block, None)
    if axis:
        gathered = (lax.all_gather(x, axis, axis=-1, tiled=True) for x in best)
        # The same on all devices, which the maximum says to JAX.
        best = tuple(lax.pmax(x, axis) for x in largest(*gathered))
    return best
