"""Sums, means, extremes and selections for each sample of a batch.

B rows, T tokens, N = B * T. A sample is a document: all tokens of the batch with one number in
`batch["sample_ids"]`, wherever packing put them. Several samples can share a row, and a document
that a row's end cut is one sample in several rows. Arrays `x_N` hold one entry a slot: every sample
has a slot, the other slots are empty. All shapes are static, and nothing depends on the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from objectives.weighting import selection


class Samples(NamedTuple):
    """Where the samples of a batch are.

    Attributes:
      slots_BT: int32, the slot of a target's sample; N for a token that belongs to no sample.
      live_BT: whether a token is a target (d != 0) of a known sample.
      unknown_BT: whether a token is a target and its sample is unknown (a negative number).
      live_N: whether a slot holds a sample.
    """

    slots_BT: jax.Array
    live_BT: jax.Array
    unknown_BT: jax.Array
    live_N: jax.Array


def find_samples(batch: dict[str, jax.Array]) -> Samples:
    """Finds the samples of a batch, by one sort of `batch["sample_ids"]`, integers [B, T].

    The slot of a sample is the place of its first target once targets are sorted by sample. Tokens
    with d = 0, such as prompts and padding, belong to no sample.
    """
    ids_BT = batch["sample_ids"]
    target_BT = batch["weights"] != 0
    live_BT = target_BT & (ids_BT >= 0)
    last = jnp.iinfo(jnp.int32).max
    ids_N = jnp.where(live_BT, ids_BT, last).astype(jnp.int32).reshape(-1)
    index_N = jnp.arange(ids_N.size, dtype=jnp.int32)
    sorted_N, order_N = lax.sort((ids_N, index_N), num_keys=1)
    first_N = jnp.concatenate([jnp.ones((1,), bool), sorted_N[1:] != sorted_N[:-1]])
    starts_N = lax.cummax(jnp.where(first_N, index_N, 0))
    slots_BT = jnp.zeros_like(ids_N).at[order_N].set(starts_N).reshape(ids_BT.shape)
    return Samples(
        jnp.where(live_BT, slots_BT, ids_N.size),
        live_BT,
        target_BT & ~live_BT,
        first_N & (index_N < jnp.sum(live_BT)),
    )


def sample_sums(samples: Samples, *values_BT: jax.Array) -> list[jax.Array]:
    """The sums of float32 arrays over the targets of each sample, [N] for each array.

    On a GPU scattered sums have no fixed order: a repeated run may differ in their last bits.
    """
    zeros_N = jnp.zeros((samples.slots_BT.size,), jnp.float32)
    return [zeros_N.at[samples.slots_BT].add(x_BT, mode="drop") for x_BT in values_BT]


def sample_means(
    samples: Samples, weights_BT: jax.Array, *values_BT: jax.Array
) -> tuple[jax.Array, ...]:
    """sum(weights * x) / sum(weights) over the targets of each sample, [N] for each x.

    0 where the weights add up to 0, as in an empty slot. NaN spreads to the whole sample.
    """
    # Selected first: what is no target may hold anything.
    safe_BT = jnp.where(samples.live_BT, weights_BT, 0.0)
    products = (jnp.where(safe_BT != 0, safe_BT * x_BT, 0.0) for x_BT in values_BT)
    total_N, *sums = sample_sums(samples, safe_BT, *products)
    total_N = jnp.where(total_N != 0, total_N, 1.0)
    return tuple(sum_N / total_N for sum_N in sums)


def spread(samples: Samples, values_N: jax.Array) -> jax.Array:
    """Gives every target the value of its sample, [B, T].

    Floats are NaN at a target of an unknown sample, and 1 at what is no target. Booleans are False
    at both.
    """
    values_BT = values_N[jnp.minimum(samples.slots_BT, samples.slots_BT.size - 1)]
    if values_N.dtype == bool:
        return samples.live_BT & values_BT
    return jnp.where(samples.live_BT, values_BT, jnp.where(samples.unknown_BT, jnp.nan, 1.0))


def scale_samples_to_unit(
    samples: Samples, values_BT: jax.Array, *, epsilon: float = 1e-8
) -> jax.Array:
    """(x - min) / (max - min + epsilon) over the targets of each sample, [B, T].

    NaN spreads to the whole sample; see `spread` for unknown samples.
    """
    empty_N = jnp.full((samples.slots_BT.size,), jnp.inf, jnp.float32)
    low_N = empty_N.at[samples.slots_BT].min(values_BT, mode="drop")
    high_N = (-empty_N).at[samples.slots_BT].max(values_BT, mode="drop")
    low_BT, high_BT = spread(samples, low_N), spread(samples, high_N)
    return (values_BT - low_BT) / (high_BT - low_BT + epsilon)


def highest_of_samples(samples: Samples, score_BT: jax.Array, share: float) -> jax.Array:
    """Which targets are among the ceil(share * n) highest scores of the n targets of their sample.

    Targets that tie with the last one kept are all kept, as in `selection.highest`. One sort by
    sample and score.

    Args:
      samples: of the batch.
      score_BT: float32; no NaN where `samples.live_BT` is true.
      share: in (0, 1], four decimal places; 1 keeps all.

    Returns:
      Booleans [B, T], False at what is no target of a known sample.
    """
    if share == 1:
        return samples.live_BT
    slots_BT = samples.slots_BT
    keys_BT = selection.ordered(score_BT)
    # The highest first: a slot is the place where the sorted targets of its sample begin.
    _, sorted_N = lax.sort((slots_BT.reshape(-1), ~keys_BT.reshape(-1)), num_keys=2)
    count_N = jnp.zeros((slots_BT.size,), jnp.int32).at[slots_BT].add(1, mode="drop")
    wanted_N = selection.share_of(count_N, share)
    last_N = jnp.arange(slots_BT.size) + jnp.maximum(wanted_N - 1, 0)
    threshold_N = ~sorted_N[jnp.minimum(last_N, slots_BT.size - 1)]
    threshold_BT = threshold_N[jnp.minimum(slots_BT, slots_BT.size - 1)]
    return samples.live_BT & (keys_BT >= threshold_BT)


def neighbour_sums(samples: Samples, places_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """The sum of the values of the tokens before and after a target in its document, [B, T].

    Where such a token is not a target of the same sample, or not in the batch, the target's own
    value stands for it. A document that is in the batch twice can get the value of its other copy.

    Args:
      samples: of the batch.
      places_BT: integers, the place of a token in its document.
      values_BT: float32; what is no target may hold anything.
    """
    size = places_BT.size
    index_N = jnp.arange(size, dtype=jnp.int32)
    keys = (samples.slots_BT.reshape(-1), places_BT.reshape(-1))
    slots_N, places_N, order_N = lax.sort((*keys, index_N), num_keys=2)
    values_N = values_BT.reshape(-1)[order_N]
    same_N = slots_N[1:] == slots_N[:-1]
    steps_N = places_N[1:] - places_N[:-1]
    first_N = jnp.concatenate([jnp.ones((1,), bool), ~same_N | (steps_N != 0)])
    # Whether an entry, the first of its place, follows the place before it in the document.
    linked_N = jnp.concatenate([jnp.zeros((1,), bool), same_N & (steps_N == 1)])
    own_N = lax.cummax(jnp.where(first_N, index_N, 0))
    begins_N = lax.cummin(jnp.where(first_N, index_N, size), reverse=True)
    after_N = jnp.concatenate([begins_N[1:], jnp.full((1,), size)])
    before_N = jnp.where(linked_N[own_N], values_N[own_N - 1], values_N)
    follows_N = linked_N.at[after_N].get(mode="fill", fill_value=False)
    sums_N = before_N + jnp.where(follows_N, values_N[after_N], values_N)
    return jnp.zeros_like(sums_N).at[order_N].set(sums_N).reshape(values_BT.shape)
