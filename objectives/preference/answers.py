"""Where the answers of a batch of pairs are, and sums over them.

B rows, T tokens, P pairs of a row: P = T, a slot for every number that `pair_ids` can have.

A pair stands in one row, as two adjacent segments [prompt chosen][prompt rejected], and several
pairs can share a row. So every sum here is a sum within a row: neither micro-batches nor devices
split a pair.

  pair_ids  int32 [B, T], the number of a token's pair in its row, from 0; -1 in the padding. In
            data without pairs every answer has a number of its own.
  sides     int32 [B, T], 1 in a chosen (desirable) answer, -1 in a rejected (undesirable) one, 0
            elsewhere; a prompt has the side of its answer.
  weights   of the data, d: 0 at prompts and padding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.segments import sums_by_number

# What a batch must hold for the functions of this file.
KEYS = ("pair_ids", "sides")

CHOSEN, REJECTED = 1, -1


class Sides(NamedTuple):
    """The same of the chosen and of the rejected answers."""

    chosen: jax.Array
    rejected: jax.Array


def side_weights(batch: Mapping[str, jax.Array]) -> Sides:
    """d at the tokens of the answers of one side, and 0 elsewhere, [B, T]."""
    weights_BT = jnp.where(batch["pair_ids"] >= 0, batch["weights"], 0.0)
    return Sides(
        jnp.where(batch["sides"] == CHOSEN, weights_BT, 0.0),
        jnp.where(batch["sides"] == REJECTED, weights_BT, 0.0),
    )


def pair_sums(batch: Mapping[str, jax.Array], values_BT: jax.Array) -> Sides:
    """sum(d * x) over the chosen answer of each pair, and over the rejected one, [B, P]."""
    weights = side_weights(batch)
    return Sides(*(sums_by_number(batch["pair_ids"], w_BT, values_BT) for w_BT in weights))


def lengths(batch: Mapping[str, jax.Array]) -> Sides:
    """sum(d) over the answers, [B, P]: their numbers of tokens, where d is 1."""
    return pair_sums(batch, jnp.ones_like(batch["weights"]))


def are_there(batch: Mapping[str, jax.Array]) -> Sides:
    """Whether a slot has an answer of this side with a target, [B, P] booleans."""
    targets = (jnp.where(w_BT != 0, 1.0, 0.0) for w_BT in side_weights(batch))
    ones_BT = jnp.ones_like(batch["weights"])
    return Sides(*(sums_by_number(batch["pair_ids"], t_BT, ones_BT) > 0 for t_BT in targets))


def are_pairs(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Whether a slot has answers of both sides, [B, P] booleans."""
    there = are_there(batch)
    return there.chosen & there.rejected
