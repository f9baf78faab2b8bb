"""Passes over a vocabulary in blocks, and functions from hidden states and a block to logits.

A vocabulary may be spread over the devices of a mapped axis (`jax.shard_map`). Every device then
passes over its own columns of the head, and the results are merged by collectives of [B, T] arrays.
V is the number of columns that a device holds.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Close to the fastest size for vocabularies of 2,048 to 131,072, with half the temporary memory of
# the next larger one; see docs/speed.md.
DEFAULT_BLOCK_SIZE = 1024


class Scores(NamedTuple):
    """A function from hidden states and a block of the head to logits, and its gradient.

    Attributes:
      logits: (hidden [B, T, D], head [D, K]) -> float32 [B, T, K].
      pull_back: (hidden, head, logits, d logits, live [B, T]) -> float32 (d hidden, d head). Where
        `live` is False the gradient of the logits counts as 0, even if it is NaN. Not used where
        the block size is 0.
    """

    logits: Callable[[jax.Array, jax.Array], jax.Array]
    pull_back: Callable[..., tuple[jax.Array, jax.Array]]


@functools.cache
def products(softcap: float = 0.0, temperature: float = 1.0) -> Scores:
    """z = hidden @ head, or c tanh(hidden @ head / c) with c = `softcap` > 0; then z / temperature.

    Products are formed in the promoted dtype of both and summed in float32.
    """

    def logits(hidden_BTD, head_DK):
        logits_BTK = jnp.einsum(
            "btd,dk->btk", hidden_BTD, head_DK, preferred_element_type=jnp.float32
        )
        logits_BTK = softcap * jnp.tanh(logits_BTK / softcap) if softcap else logits_BTK
        return logits_BTK if temperature == 1 else logits_BTK / temperature

    def pull_back(hidden_BTD, head_DK, logits_BTK, dz_BTK, live_BT):
        if softcap:
            dz_BTK *= 1 - jnp.square(logits_BTK * (temperature / softcap))
        if temperature != 1:
            dz_BTK /= temperature
        dz_BTK = jnp.where(live_BT[..., None], dz_BTK, 0)
        dz_BTK = dz_BTK.astype(jnp.promote_types(hidden_BTD.dtype, head_DK.dtype))
        dhidden_BTD = jnp.einsum("btk,dk->btd", dz_BTK, head_DK, preferred_element_type=jnp.float32)
        # hidden^T dz, in the order in which the head lies in memory, and not (dz^T hidden)^T.
        dhead_DK = jnp.einsum("btd,btk->dk", hidden_BTD, dz_BTK, preferred_element_type=jnp.float32)
        return dhidden_BTD, dhead_DK

    return Scores(logits, pull_back)


def differentiated(logits: Callable[[jax.Array, jax.Array], jax.Array]) -> Scores:
    """Scores of any differentiable function of float32 hidden states and a float32 block.

    Args:
      logits: (hidden [B, T, D], head [D, K]) -> [B, T, K].
    """

    def pull_back(hidden_BTD, head_DK, logits_BTK, dz_BTK, live_BT):
        hidden_BTD, head_DK = (x.astype(jnp.float32) for x in (hidden_BTD, head_DK))
        return jax.vjp(logits, hidden_BTD, head_DK)[1](jnp.where(live_BT[..., None], dz_BTK, 0))

    return Scores(
        lambda hidden_BTD, head_DK: logits(
            hidden_BTD.astype(jnp.float32), head_DK.astype(jnp.float32)
        ),
        pull_back,
    )


def for_each_block(
    heads: Any, block_size: int, body: Callable[[Any, Any, Any], Any], carry: Any
) -> Any:
    """carry = body(carry, head[:, start : start + K], start) for every block, in order.

    Where the block size does not divide V, the smaller block comes first, outside of the loop.
    Nothing is padded, so that no mask is needed and the head is not copied. The first carry may
    have another structure than the later ones (None where there is no neutral element).

    Args:
      heads: an array [D, V], or a tree of arrays [..., V] that are all cut at the same columns.
      block_size: columns of a block; 0 is all V in one.
      body: see above; `start` is 0 for the first block and then an integer tracer.
      carry: the first one.

    Returns:
      The last carry.
    """
    vocabulary = jax.tree.leaves(heads)[0].shape[-1]
    block_size = min(block_size or vocabulary, vocabulary)
    width = vocabulary % block_size or block_size

    def next_block(i, carry):
        start = width + i * block_size

        def cut(head):
            return lax.dynamic_slice_in_dim(head, start, block_size, axis=head.ndim - 1)

        return body(carry, jax.tree.map(cut, heads), start)

    carry = body(carry, jax.tree.map(lambda head: head[..., :width], heads), 0)
    return lax.fori_loop(0, (vocabulary - width) // block_size, next_block, carry)


def first_column(head: jax.Array, axis: str | None) -> jax.Array | int:
    """Index in the whole vocabulary of the first column of this device's part of the head."""
    return lax.axis_index(axis) * head.shape[-1] if axis else 0


def vocabulary_size(head: jax.Array, axis: str | None) -> int:
    """Columns of the head, those of all devices of the axis together."""
    return head.shape[-1] * (lax.axis_size(axis) if axis else 1)


def own_rows(x_VH: jax.Array, head: jax.Array, axis: str | None) -> jax.Array:
    """The rows of an array of the whole vocabulary that belong to this device's columns."""
    if axis is None:
        return x_VH
    return lax.dynamic_slice_in_dim(x_VH, first_column(head, axis), head.shape[-1])


def as_head(x_DV: jax.Array, head: jax.Array, axis: str | None) -> jax.Array:
    """Parameters of a loss in the place of the head: this device's columns, in the head's dtype."""
    x_DV = own_rows(x_DV.T, head, axis).T.astype(head.dtype)
    # The same, but to JAX it now may differ between the devices between which the head may. So is
    # the gradient of what they hold alike summed over them.
    return jnp.where(jnp.isnan(head), x_DV, x_DV)


def total(parts: Any, axis: str | None) -> Any:
    """A tree of arrays, summed over the devices of the axis; unchanged without an axis."""
    return lax.psum(parts, axis) if axis else parts


def add_gradients(
    sums: tuple[jax.Array | None, jax.Array], block: tuple[jax.Array, jax.Array], start: Any
) -> tuple[jax.Array, jax.Array]:
    """Adds a block's gradient of the hidden states, and writes its gradient of the head.

    Args:
      sums: gradients so far: of the hidden states (None for none yet) and of the head [D, V].
      block: float32 gradients that one block gives: [B, T, D] and [D, K].
      start: the block's first column.
    """
    (dhidden_BTD, dhead_DV), (block_dhidden_BTD, dhead_DK) = sums, block
    dhead_DK = dhead_DK.astype(dhead_DV.dtype)
    dhead_DV = lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DK, start, axis=1)
    if dhidden_BTD is None:
        return block_dhidden_BTD, dhead_DV
    return dhidden_BTD + block_dhidden_BTD, dhead_DV


def not_finite(scores: Scores, hidden: jax.Array, head: jax.Array, axis: str | None) -> jax.Array:
    """Which tokens have a hidden state or a logit that is NaN or infinite, [B, T] bool.

    Automatic differentiation multiplies the derivatives of such a token by its cotangent, and
    0 * NaN is NaN. A pass by plain differentiation therefore replaces these tokens before any
    arithmetic. Costs one product of its own, not differentiated.
    """
    hidden, head = lax.stop_gradient((hidden, head))
    finite_BT = jnp.isfinite(hidden).all(-1) & jnp.isfinite(scores.logits(hidden, head)).all(-1)
    return total((~finite_BT).astype(jnp.float32), axis) > 0
