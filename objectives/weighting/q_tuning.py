"""Quadrants of perplexity and entropy: which samples to keep, and which of their tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.weighting import selection
from objectives.weighting.base import (
    Weighting,
    check_name,
    check_number,
    live_rows,
    multiply,
    row_mean,
    scale_to_unit,
    stateless,
)

_BISECTIONS = 10
_MOST = 0.49
# exp(80) is near the end of float32.
_LARGEST_NLL = 80.0


def q_tuning(
    keep_samples: float = 0.25,
    keep_tokens: float = 0.5,
    smoothing: float = 0.5,
    prune: str = "highest",
    neighbours: str = "mean",
) -> Weighting:
    """w = d * [row kept] * [token kept]; rows by quadrant, tokens by smoothed perplexity.

    Q-Tuning (arXiv 2509.23873). A row has PPL = exp(mean l) and Ent = mean entropy; with Q_a the
    a-quantile over the rows of the batch, high is >= Q_{1-a} and low is <= Q_a. Kept are

      high PPL, low Ent (misconceptions): their ceil(keep_tokens * n) tokens, see below
      low PPL, high Ent (calibration): whole

    and not the rows that are high in both (noise) or low in both (redundant). a in [0, 0.49] is
    the largest of 10 bisections that keeps no more than ceil(keep_samples * rows); the rows that
    are missing then are those with the largest |norm(PPL) - norm(Ent)|, treated as the quadrant on
    their side. Tokens are kept by their score

      (1 - smoothing) * PPL_t + smoothing * (PPL_{t-1} + PPL_{t+1}) / 2, PPL_t = exp(l_t)

    where a neighbour that is no target of the row is replaced by the token itself.

    UNCONFIRMED, from a text that contradicts itself: whether the highest or the lowest scores are
    removed, and the factor 1/2 of the neighbours. Ours: quantiles are interpolated linearly, a is
    one number for both axes, and how filled-in rows are treated. keep_samples = keep_tokens = 1 is
    cross-entropy. The paper's loss is taken here as the mean over kept tokens, `kept`.

    Args:
      keep_samples: share of rows kept, in (0, 1]; 0.125 or 0.25 in the paper.
      keep_tokens: share of the tokens of misconceptions kept, in (0, 1]; 0.5 or 0.7.
      smoothing: weight of the neighbours, in [0, 1]; 0.5 in the paper.
      prune: which scores are removed, "highest" or "lowest".
      neighbours: "mean", or "sum" without the factor 1/2.

    Raises:
      ValueError: a hyper-parameter outside of its range.
    """
    selection.check_share("keep_samples", keep_samples)
    selection.check_share("keep_tokens", keep_tokens)
    check_number("smoothing", smoothing, least=0, most=1)
    check_name("prune", prune, ("highest", "lowest"))
    check_name("neighbours", neighbours, ("mean", "sum"))

    def weigh(statistics, batch, references, state, step):
        statistics = lax.stop_gradient(statistics)
        live_BT = batch["weights"] != 0
        live_B = live_rows(batch["weights"])[:, 0]
        ppl_B = jnp.exp(jnp.minimum(row_mean(statistics.nll, batch["weights"]), _LARGEST_NLL))[:, 0]
        entropy_B = row_mean(statistics.entropy, batch["weights"])[:, 0]
        whole_B, pruned_B = choose_rows(ppl_B, entropy_B, live_B, keep_samples)
        score_BT = smoothed_perplexity(statistics.nll, live_BT, smoothing, neighbours)
        score_BT = -score_BT if prune == "highest" else score_BT
        tokens_BT = selection.highest(score_BT, live_BT, keep_tokens, axis=1)
        kept_BT = whole_B[:, None] | (pruned_B[:, None] & tokens_BT)
        unknown_BT = jnp.isnan(statistics.nll) | jnp.isnan(statistics.entropy)
        weights_BT = multiply(batch, jnp.where(unknown_BT, jnp.nan, kept_BT))
        rows = jnp.maximum(jnp.sum(live_B), 1)
        return weights_BT, state, {"q_tuning_rows": jnp.sum(whole_B | pruned_B) / rows}

    return Weighting(stateless, weigh, uses_statistics=True)


def choose_rows(
    ppl_B: jax.Array, entropy_B: jax.Array, live_B: jax.Array, keep: float
) -> tuple[jax.Array, jax.Array]:
    """Which rows are kept whole, and which with their tokens pruned; see `q_tuning`. [B] each."""
    wanted = selection.share_of(jnp.sum(live_B, dtype=jnp.int32), keep)

    def quadrants(a):
        ppl_low, ppl_high = quantile(ppl_B, live_B, a), quantile(ppl_B, live_B, 1 - a)
        low, high = quantile(entropy_B, live_B, a), quantile(entropy_B, live_B, 1 - a)
        whole_B = live_B & (ppl_B <= ppl_low) & (entropy_B >= high)
        pruned_B = live_B & (ppl_B >= ppl_high) & (entropy_B <= low)
        # Where all rows are equal, a row is in both.
        return whole_B, pruned_B & ~whole_B

    def bisect(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        whole_B, pruned_B = quadrants(middle)
        few = jnp.sum(whole_B | pruned_B) <= wanted
        return jnp.where(few, middle, low), jnp.where(few, high, middle)

    start = jnp.float32(0.0), jnp.float32(_MOST)
    a, _ = lax.fori_loop(0, _BISECTIONS, bisect, start)
    whole_B, pruned_B = quadrants(a)
    chosen_B = whole_B | pruned_B
    lean_B = scale_to_unit(ppl_B, live_B, axis=None) - scale_to_unit(entropy_B, live_B, axis=None)
    # Those chosen already come first; the largest score is 1.
    filled_B = selection.highest(jnp.abs(lean_B) + 2 * chosen_B, live_B, keep, axis=None)
    whole_B |= filled_B & ~chosen_B & (lean_B <= 0)
    pruned_B |= filled_B & ~chosen_B & (lean_B > 0)
    return whole_B, pruned_B


def quantile(values: jax.Array, mask: jax.Array, q: jax.Array) -> jax.Array:
    """The q-quantile of the masked entries of a vector, interpolated linearly."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    place = q * jnp.maximum(jnp.sum(mask) - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(jnp.sum(mask) - 1, 0))
    # Not ordered[below] + ... of infinities: inf - inf is NaN.
    share = place - below
    return jnp.where(
        share > 0, (1 - share) * ordered[below] + share * ordered[above], ordered[below]
    )


def smoothed_perplexity(
    nll_BT: jax.Array, live_BT: jax.Array, smoothing: float, neighbours: str = "mean"
) -> jax.Array:
    """The token score of `q_tuning`, [B, T]."""
    ppl_BT = jnp.exp(jnp.minimum(nll_BT, _LARGEST_NLL))

    def neighbour(shift):
        index = jnp.arange(ppl_BT.shape[1]) + shift
        inside_BT = (index >= 0) & (index < ppl_BT.shape[1])
        inside_BT &= jnp.roll(live_BT, -shift, axis=1)
        return jnp.where(inside_BT, jnp.roll(ppl_BT, -shift, axis=1), ppl_BT)

    around_BT = neighbour(-1) + neighbour(1)
    around_BT = around_BT / 2 if neighbours == "mean" else around_BT
    return (1 - smoothing) * ppl_BT + smoothing * around_BT
