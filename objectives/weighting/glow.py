"""GLOW: samples that no longer improve count more."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_number,
    live_rows,
    multiply,
    row_mean,
)

# In the table of losses, which are not negative.
_NEVER = -1.0


def glow(
    samples: int = 0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lowest: float = 0.5,
    highest: float = 5.0,
) -> Weighting:
    """w = d * clip(alpha * (1 - sigmoid(beta * (l_before - l_now))), lowest, highest) of each row.

    l is the mean loss of the row (weighted by d), now and at the last visit. GLOW (arXiv
    2601.04992, and its released code): the plain mean over the batch, normalisation `all`, so that
    the weights change the effective learning rate. A row that was never visited has w = d, as all
    have in the paper's first epoch; the released code compares a missing one with the mean of the
    batch. The paper's values are alpha 1 or 2 and beta 5 to 30. beta = 0 and alpha = 2 is
    cross-entropy; alpha = 1 halves the weight of a sample that stands still.

    State: float32 [samples], the loss at the last visit, -1 where there was none. Of the rows of
    one batch with the same id, the largest loss is remembered, whatever their order. A row with
    targets whose id is not in [0, samples) gets the weight NaN: the step is skipped and counted.

    Args:
      samples: length of the table, one more than the largest id in `batch["sample_ids"]`, which
        is [B] int32 and names the same sample in every epoch.
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
        live_B = live_rows(batch["weights"])[:, 0]
        ids_B = batch["sample_ids"]
        known_B = (ids_B >= 0) & (ids_B < samples)
        now_B = row_mean(jax.lax.stop_gradient(statistics.nll), batch["weights"])[:, 0]
        before_B = state[jnp.clip(ids_B, 0, samples - 1)]
        gain_B = alpha * (1 - jax.nn.sigmoid(beta * (before_B - now_B)))
        seen_B = known_B & (before_B >= 0)
        multiplier_B = jnp.where(seen_B, jnp.clip(gain_B, lowest, highest), 1.0)
        multiplier_B = jnp.where(known_B & ~jnp.isnan(now_B), multiplier_B, jnp.nan)
        # Out of bounds is dropped; -1 would count from the end.
        slot_B = jnp.where(live_B & known_B, ids_B, samples)
        # A maximum into an empty table: what several devices scatter is joined by a maximum, which
        # is wrong for other updates and loses NaN.
        visited = init().at[slot_B].max(jnp.maximum(now_B, 0.0), mode="drop")
        table = jnp.where(visited >= 0, visited, state)
        rows = jnp.maximum(jnp.sum(live_B), 1)
        metrics = {
            "glow_mean_weight": jnp.sum(jnp.where(live_B, multiplier_B, 0.0)) / rows,
            "glow_seen": jnp.sum(live_B & seen_B) / rows,
        }
        return multiply(batch, multiplier_B[:, None]), table, metrics

    return Weighting(init, weigh, uses_statistics=True, batch_keys=("sample_ids",))
