"""GLOW: samples that no longer improve count more."""

from typing import Annotated

import jax
import jax.numpy as jnp

from objectives.weighting.base import TRAINING_DOCUMENTS, Weighting, check_number, multiply

# In the table of losses, which are not negative.
_NEVER = -1.0


def glow(
    samples: Annotated[int, TRAINING_DOCUMENTS] = 0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lowest: float = 0.5,
    highest: float = 5.0,
) -> Weighting:
    """w = d * clip(alpha * (1 - sigmoid(beta * (l_before - l_now))), lowest, highest), by sample.

    l_now is sum(d l) / sum(d) over all tokens of the batch that have the sample's id, l_before the
    same at its last visit. GLOW (arXiv 2601.04992, and its released code): the plain mean over the
    batch, normalisation `all`, so that the weights change the effective learning rate. A sample
    that was never visited has w = d, as all have in the paper's first epoch; the released code
    compares a missing one with the mean of the batch. The paper's values are alpha 1 or 2 and beta
    5 to 30. beta = 0 and alpha = 2 is cross-entropy; alpha = 1 halves the weight of a sample that
    stands still.

    A sample is a training document, which in the paper is whole in one row: that is
    `data.packing=best_fit` with documents no longer than `data.sequence_length`. The pieces of one
    that is cut share its entry: those that meet in a batch are one visit, those that do not are
    compared with each other.

    State: float32 [samples], the loss at the last visit, -1 where there was none. The order of
    rows, micro-batches and devices changes nothing but the order of the sums, that is, the last
    bits of l_now (on a GPU, scattered sums have no fixed order: a repeated run may differ in them).
    A token with d != 0 whose id is not in [0, samples) gets the weight NaN: the step is skipped and
    counted.

    Args:
      samples: length of the table of past losses, more than the largest id in
        `batch["sample_ids"]`; in a config 0 is the number of training documents.
      alpha: scale, above 0.
      beta: steepness, at least 0.
      lowest: smallest weight.
      highest: largest weight.

    Raises:
      ValueError: a hyper-parameter outside of its range.
    """
    check_number("samples", samples, least=1)
    check_number("alpha", alpha, above=0)
    check_number("beta", beta, least=0)
    check_number("lowest", lowest, least=0)
    check_number("highest", highest, least=lowest)

    def init():
        return jnp.full((samples,), _NEVER, jnp.float32)

    def weigh(statistics, batch, references, state, step):
        data_BT, ids_BT = batch["weights"], batch["sample_ids"]
        live_BT = data_BT != 0
        known_BT = live_BT & (ids_BT >= 0) & (ids_BT < samples)
        # Out of bounds is dropped; -1 would count from the end.
        slots_BT = jnp.where(known_BT, ids_BT, samples)
        sums = jnp.where(live_BT, data_BT * jax.lax.stop_gradient(statistics.nll), 0.0)

        def per_sample(values_BT):
            return jnp.zeros_like(state).at[slots_BT].add(values_BT, mode="drop")

        totals = per_sample(jnp.where(live_BT, data_BT, 0.0))
        visited = totals != 0
        now = per_sample(sums) / jnp.where(visited, totals, 1.0)
        seen = visited & (state >= 0)
        gain = jnp.clip(alpha * (1 - jax.nn.sigmoid(beta * (state - now))), lowest, highest)
        multiplier = jnp.where(seen, gain, 1.0)
        multiplier = jnp.where(jnp.isnan(now), jnp.nan, multiplier)
        multiplier_BT = jnp.where(known_BT, multiplier[jnp.clip(ids_BT, 0, samples - 1)], jnp.nan)
        count = jnp.maximum(jnp.sum(visited), 1)
        metrics = {
            "glow_mean_weight": jnp.sum(jnp.where(visited, multiplier, 0.0)) / count,
            "glow_seen": jnp.sum(seen) / count,
        }
        table = jnp.where(visited, jnp.maximum(now, 0.0), state)
        return multiply(batch, multiplier_BT), table, metrics

    return Weighting(init, weigh, uses_statistics=True, batch_keys=("sample_ids",))
