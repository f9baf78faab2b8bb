"""Quadrants of perplexity and entropy: which samples to keep, and which of their tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.weighting import selection
from objectives.weighting.base import (
    Weighting,
    check_name,
    check_number,
    multiply,
    stateless,
)
from objectives.weighting.samples import (
    Samples,
    find_samples,
    highest_of_samples,
    neighbour_sums,
    sample_means,
    spread,
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
    """w = d * [sample kept] * [token kept]; samples by quadrant, tokens by smoothed perplexity.

    Q-Tuning (arXiv 2509.23873). A sample is a document, by `batch["sample_ids"]`. It has the
    perplexity PPL = exp(mean l) and the mean entropy Ent. With Q_a the a-quantile over the samples
    of the batch, high is >= Q_{1-a} and low is <= Q_a. Kept are

      high PPL, low Ent (misconceptions): their ceil(keep_tokens * n) tokens, see below
      low PPL, high Ent (calibration): whole

    and not the samples that are high in both (noise) or low in both (redundant). a in [0, 0.49] is
    the largest value found by 10 bisections that keeps at most ceil(keep_samples * samples). The
    samples still missing are those with the largest |norm(PPL) - norm(Ent)|, treated like the
    quadrant on their side. Tokens are kept by their score

      (1 - smoothing) * PPL_t + smoothing * (PPL_{t-1} + PPL_{t+1}) / 2, PPL_t = exp(l_t)

    where a neighbour that is not a target of the same sample is replaced by the token itself. At
    the end of a row a neighbour can stand in another row of the batch.

    UNCONFIRMED, from a text that contradicts itself: whether the highest or the lowest scores are
    removed, and the factor 1/2 of the neighbours. Ours: quantiles are interpolated linearly, a is
    one number for both axes, and how filled-in rows are treated. keep_samples = keep_tokens = 1 is
    cross-entropy. The paper's loss is taken here as the mean over kept tokens, `kept`.

    Args:
      keep_samples: share of samples kept, in (0, 1]; 0.125 or 0.25 in the paper.
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
        samples = find_samples(batch)
        nll_N, entropy_N = sample_means(
            samples, batch["weights"], statistics.nll, statistics.entropy
        )
        ppl_N = jnp.exp(jnp.minimum(nll_N, _LARGEST_NLL))
        whole_N, pruned_N = choose_samples(ppl_N, entropy_N, samples.live_N, keep_samples)
        score_BT = smoothed_perplexity(
            statistics.nll, samples, batch["sample_positions"], smoothing, neighbours
        )
        score_BT = -score_BT if prune == "highest" else score_BT
        tokens_BT = highest_of_samples(samples, score_BT, keep_tokens)
        kept_BT = spread(samples, whole_N) | (spread(samples, pruned_N) & tokens_BT)
        unknown_BT = jnp.isnan(statistics.nll) | jnp.isnan(statistics.entropy) | samples.unknown_BT
        weights_BT = multiply(batch, jnp.where(unknown_BT, jnp.nan, kept_BT))
        count = jnp.maximum(jnp.sum(samples.live_N), 1)
        return weights_BT, state, {"q_tuning_samples": jnp.sum(whole_N | pruned_N) / count}

    return Weighting(
        stateless, weigh, uses_statistics=True, batch_keys=("sample_ids", "sample_positions")
    )


def choose_samples(
    ppl_N: jax.Array, entropy_N: jax.Array, live_N: jax.Array, keep: float
) -> tuple[jax.Array, jax.Array]:
    """Which samples are kept whole, and which with their tokens pruned; see `q_tuning`.

    Args:
      ppl_N: perplexity of a sample.
      entropy_N: mean entropy of a sample, nats.
      live_N: whether the entry is a sample.
      keep: share of the samples that are kept, in (0, 1].

    Returns:
      Two arrays of booleans [N], never both true.
    """
    count = jnp.sum(live_N, dtype=jnp.int32)
    wanted = selection.share_of(count, keep)
    sorted_ppl_N, sorted_entropy_N = (
        jnp.sort(jnp.where(live_N, x_N, jnp.inf)) for x_N in (ppl_N, entropy_N)
    )

    def quadrants(a):
        ppl_low, ppl_high = (quantile(sorted_ppl_N, count, q) for q in (a, 1 - a))
        low, high = (quantile(sorted_entropy_N, count, q) for q in (a, 1 - a))
        whole_N = live_N & (ppl_N <= ppl_low) & (entropy_N >= high)
        pruned_N = live_N & (ppl_N >= ppl_high) & (entropy_N <= low)
        # Where all samples are equal, a sample is in both.
        return whole_N, pruned_N & ~whole_N

    def bisect(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        whole_N, pruned_N = quadrants(middle)
        few = jnp.sum(whole_N | pruned_N) <= wanted
        return jnp.where(few, middle, low), jnp.where(few, high, middle)

    start = jnp.float32(0.0), jnp.float32(_MOST)
    a, _ = lax.fori_loop(0, _BISECTIONS, bisect, start)
    whole_N, pruned_N = quadrants(a)
    chosen_N = whole_N | pruned_N
    lean_N = _scale_to_unit(ppl_N, live_N) - _scale_to_unit(entropy_N, live_N)
    # Those chosen already come first; the largest score is 1.
    filled_N = selection.highest(jnp.abs(lean_N) + 2 * chosen_N, live_N, keep)
    whole_N |= filled_N & ~chosen_N & (lean_N <= 0)
    pruned_N |= filled_N & ~chosen_N & (lean_N > 0)
    return whole_N, pruned_N


def quantile(sorted_N: jax.Array, count: jax.Array, q: jax.Array) -> jax.Array:
    """The q-quantile of the first `count` entries of a sorted vector, interpolated linearly."""
    place = q * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
    # Not sorted[below] + ... of infinities: inf - inf is NaN.
    share = place - below
    return jnp.where(
        share > 0, (1 - share) * sorted_N[below] + share * sorted_N[above], sorted_N[below]
    )


def _scale_to_unit(values_N: jax.Array, live_N: jax.Array) -> jax.Array:
    low = jnp.min(values_N, where=live_N, initial=jnp.inf)
    high = jnp.max(values_N, where=live_N, initial=-jnp.inf)
    return (values_N - low) / (high - low + 1e-8)


def smoothed_perplexity(
    nll_BT: jax.Array,
    samples: Samples,
    places_BT: jax.Array,
    smoothing: float,
    neighbours: str = "mean",
) -> jax.Array:
    """The token score of `q_tuning`, [B, T].

    Args:
      nll_BT: loss of a token, nats.
      samples: of the batch.
      places_BT: integers, the place of a token in its document.
      smoothing: weight of the neighbours.
      neighbours: "mean" or "sum".
    """
    ppl_BT = jnp.exp(jnp.minimum(nll_BT, _LARGEST_NLL))
    around_BT = neighbour_sums(samples, places_BT, ppl_BT)
    around_BT = around_BT / 2 if neighbours == "mean" else around_BT
    return (1 - smoothing) * ppl_BT + smoothing * around_BT
