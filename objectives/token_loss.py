"""From per-token statistics to the scalar that is minimised.

B batch, T length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.cross_entropy import TokenStatistics
from objectives.losses.base import LossStatistics


class Denominators(NamedTuple):
    """What the sums are divided by, over the whole global, accumulated batch; float32 scalars."""

    weight: jax.Array  # sum of token weights, or of the data's under normalisation "all"
    targets: jax.Array  # number of targets: tokens to which the data gives any weight


def denominators(
    weights_BT: jax.Array, data_weights_BT: jax.Array, normaliser: str = "kept"
) -> Denominators:
    """The denominators of a batch whose tokens are weighted by `weights`; constants.

    The weights are divided by their own sum ("kept") or by that of the data's weights ("all"); see
    `objectives.weighting.normalise`.
    """
    divisor_BT = {"kept": weights_BT, "all": data_weights_BT}[normaliser]
    return Denominators(
        jax.lax.stop_gradient(jnp.sum(divisor_BT)),
        jnp.sum(data_weights_BT != 0, dtype=jnp.float32),
    )


def masked_sum(weights_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """sum(w * x) over tokens with w != 0, so that 0 * NaN is 0 and passes no gradient."""
    return jnp.sum(jnp.where(weights_BT != 0, weights_BT * values_BT, 0.0))


def token_loss(
    statistics: TokenStatistics | LossStatistics,
    weights_BT: jax.Array,
    data_weights_BT: jax.Array,
    totals: Denominators,
    z_loss: float,
    reduce: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum(w * l) / sum(w) + z_loss * sum(logsumexp^2) / number of targets, l of `statistics.loss`.

    The auxiliary term keeps its own denominator: it steadies the logits of every target, also of
    those that a weighting drops (z-loss: arXiv 2204.02311, section 5). Given `totals` of the whole
    batch, the values and gradients of micro-batches add up to those of the batch; not so with
    `reduce`, which needs all tokens at once.

    Args:
      statistics: of the tokens, [B, T].
      weights_BT: float32; a token of weight 0 contributes nothing, even if its loss is NaN.
      data_weights_BT: float32; where it is 0 there is no target.
      totals: denominators of the whole batch; an all-zero batch gives 0, not NaN.
      z_loss: coefficient of the auxiliary term.
      reduce: what takes the place of the weighted mean; see `objectives.losses.Loss`.

    Returns:
      The scalar, and its parts by name: "loss", "z_loss" when the coefficient is not 0, and "nll",
      the mean over all targets, where that is not what is minimised.
    """
    total = jnp.where(totals.weight, totals.weight, 1.0)
    if reduce is None:
        loss = masked_sum(weights_BT, statistics.loss) / total
    else:
        live_BT = weights_BT != 0
        shares_BT = jnp.where(live_BT, weights_BT * (totals.targets / total), 0.0)
        loss = reduce(jnp.where(live_BT, statistics.loss, 0.0), shares_BT)
    parts = {"loss": loss}
    if isinstance(statistics, LossStatistics):
        nll = masked_sum((data_weights_BT != 0).astype(jnp.float32), statistics.nll)
        parts["nll"] = nll / jnp.maximum(totals.targets, 1.0)
    if not z_loss:
        return loss, parts
    # Select before squaring: the derivative of a square is 0 * NaN where the select comes after.
    logsumexp_BT = jnp.where(data_weights_BT != 0, statistics.logsumexp, 0.0)
    auxiliary = jnp.sum(jnp.square(logsumexp_BT)) / jnp.maximum(totals.targets, 1.0)
    return loss + z_loss * auxiliary, parts | {"z_loss": auxiliary}
