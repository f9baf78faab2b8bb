"""The likeliest tokens of a distribution, and logits of some tokens apart from all others.

B batch, T length, D width, V vocabulary, K one block of the vocabulary, N tokens of a list.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from objectives.cross_entropy import block_statistics, finish, merge, merge_over
from objectives.distillation.sums import LEFT_OUT
from objectives.losses.base import Prediction
from objectives.vocabulary import (
    Scores,
    add_gradients,
    first_column,
    for_each_block,
    not_finite,
    total,
    vocabulary_size,
)


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


class _Static(NamedTuple):
    scores: Scores
    block_size: int
    axis: str | None


def apart(
    prediction: Prediction, ids: jax.Array, block_size: int, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Logits of some tokens, and the log-sum-exp of those of all others.

    Both are differentiable in the prediction, a block of the vocabulary at a time, by the rules of
    `objectives.cross_entropy.token_statistics`.

    Args:
      prediction: hidden states, head and scores.
      ids: int32 [B, T, N], of the whole vocabulary; one may be there twice.
      block_size: columns per block; 0 is all at once and plain automatic differentiation.
      axis: name of the axis that the vocabulary is spread over; None is whole.

    Returns:
      (logits float32 [B, T, N], log-sum-exp of the rest [B, T], about -1e30 where none is left).
    """
    static = _Static(prediction.scores, block_size, axis)
    ids = ids - first_column(prediction.head, axis)
    compute = _apart if block_size else _plain
    return compute(static, prediction.hidden, prediction.head, ids)


def _places(ids_BTN, start, width):
    """Columns of a block that the ids stand for, `width` for those that are not in it."""
    ids_BTN = ids_BTN - start
    return jnp.where((ids_BTN >= 0) & (ids_BTN < width), ids_BTN, width)


def _at(ids_BTN):
    """An index of [B, T, K] arrays by columns; those that are not in the block are K."""
    rows, length, _ = ids_BTN.shape
    return jnp.arange(rows)[:, None, None], jnp.arange(length)[None, :, None], ids_BTN


def _block(z_BTK, ids_BTN, start):
    """(logits of the tokens of the list that are in the block, else 0; statistics of the rest)."""
    width = z_BTK.shape[-1]
    places_BTN = _places(ids_BTN, start, width)
    picked_BTN = jnp.take_along_axis(z_BTK, jnp.minimum(places_BTN, width - 1), axis=-1)
    rest_BTK = z_BTK.at[_at(places_BTN)].set(LEFT_OUT, mode="drop")
    none_BT = jnp.full(ids_BTN.shape[:-1], -1)
    return jnp.where(places_BTN < width, picked_BTN, 0.0), block_statistics(rest_BTK, none_BT)


def _finish(static, picked_BTN, partial):
    if static.axis:
        partial = merge_over(static.axis, partial)
    return total(picked_BTN, static.axis), finish(partial)[1]


def _plain(static, hidden_BTD, head_DV, ids_BTN):
    bad_BT = not_finite(static.scores, hidden_BTD, head_DV, static.axis)
    # Both: the product has the gradient d logits @ head, and 0 * inf is NaN.
    z_BTV = static.scores.logits(jnp.where(bad_BT[..., None], 0, hidden_BTD), head_DV)
    z_BTV = jnp.where(bad_BT[..., None], 0, z_BTV)
    picked_BTN, rest_BT = _finish(static, *_block(z_BTV, ids_BTN, 0))
    return jnp.where(bad_BT[..., None], jnp.nan, picked_BTN), jnp.where(bad_BT, jnp.nan, rest_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apart(static, hidden_BTD, head_DV, ids_BTN):
    def add_block(sums, head_DK, start):
        block = _block(static.scores.logits(hidden_BTD, head_DK), ids_BTN, start)
        return block if sums is None else (sums[0] + block[0], merge(sums[1], block[1]))

    return _finish(static, *for_each_block(head_DV, static.block_size, add_block, None))


def _forward(static, hidden_BTD, head_DV, ids_BTN):
    found = _apart(static, hidden_BTD, head_DV, ids_BTN)
    return found, (hidden_BTD, head_DV, ids_BTN, found[1])


def _backward(static, residuals, cotangents):
    first_hidden, head_DV, ids_BTN, rest_BT = residuals
    d_picked_BTN, d_rest_BT = cotangents
    live_BT = (d_picked_BTN != 0).any(-1) | (d_rest_BT != 0)
    hidden_BTD = jnp.where(live_BT[..., None], first_hidden, 0)

    def add_block(gradients, head_DK, start):
        z_BTK = static.scores.logits(hidden_BTD, head_DK)
        width = z_BTK.shape[-1]
        at = _at(_places(ids_BTN, start, width))
        dz_BTK = d_rest_BT[..., None] * jnp.exp(z_BTK - rest_BT[..., None])
        dz_BTK = dz_BTK.at[at].set(0.0, mode="drop").at[at].add(d_picked_BTN, mode="drop")
        block = static.scores.pull_back(hidden_BTD, head_DK, z_BTK, dz_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        head_DV, static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(first_hidden.dtype), dhead_DV, None


_apart.defvjp(_forward, _backward)
