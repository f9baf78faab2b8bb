"""cDPO: DPO on the critical tokens of the rejected answers.

B rows, T tokens, P pairs of a row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from objectives.objective import Objective, Prepared
from objectives.preference.answers import REJECTED, are_pairs, pair_sums, side_weights
from objectives.preference.base import REFERENCE, pairwise
from objectives.preference.dpo import judge, smoothed
from objectives.terms import Term
from objectives.weighting.base import check_number

CONTRAST = "contrast_probability"


def cdpo(
    beta: float = 0.1,
    strength: float = 1.0,
    only_rejected: bool = True,
    per_position: bool = False,
) -> Objective:
    """-log sigmoid(beta * (sum over w of u - sum over l of s * u)), u = log p - log p_reference.

    arXiv 2411.19943. s = 1 - p_c is large for tokens that only a model of wrong answers expects;
    p_c is that of `objectives.weighting.critical_token.contrast_probability`, stored by
    `launch.score --against`. Chosen answers have s = 1, or p_c without `only_rejected`, as an
    option of the released code has it. s is a constant to gradients.

    The released code is another loss, `per_position`: -log sigmoid(beta * (u_w,i - s_i u_l,i)) of
    the i-th tokens of both answers, an absent token counting 0, and the mean over these places.
    There prompts and padding count as places of log 2, which here they do not.

    Needs the references "reference_nll" and "contrast_probability".

    Args:
      beta: strength of the reference, above 0.
      strength: of the contrast, in [0, 1]; 1 is the paper's, 0 is `dpo`.
      only_rejected: weight the rejected answers alone.
      per_position: the released code's loss in place of the paper's.

    Raises:
      ValueError: a bad number.
    """
    check_number("strength", strength, least=0, most=1)

    def multiplier(aux, batch, references):
        contrast_BT = references[CONTRAST]
        rejected_BT = 1 - strength * contrast_BT
        chosen_BT = 1.0 if only_rejected else 1 - strength * (1 - contrast_BT)
        return jnp.where(batch["sides"] == REJECTED, rejected_BT, chosen_BT)

    references = (REFERENCE, CONTRAST)
    objective = pairwise(judge(beta), references=references, multiplier=multiplier)
    return _per_position(objective, beta, multiplier) if per_position else objective


def _per_position(objective: Objective, beta: float, multiplier) -> Objective:
    """The same objective with the released code's term "loss"."""

    def prepare(statistics, aux, batch, references, state, step):
        found = objective.prepare(statistics, aux, batch, references, state, step)
        places = jnp.sum(aligned(batch, jnp.ones_like(batch["weights"]))[1], dtype=jnp.float32)
        return Prepared(found.rows, {**found.totals, "places": places}, state)

    def terms(statistics, aux, batch, prepared):
        found = objective.terms(statistics, aux, batch, prepared)
        live_BT = batch["weights"] != 0
        ratio_BT = jnp.where(live_BT, statistics.log_probability + prepared.rows[REFERENCE], 0.0)
        weight_BT = jnp.where(live_BT, multiplier(aux, batch, prepared.rows), 0.0)
        margin_BT, there_BT = aligned(batch, jax.lax.stop_gradient(weight_BT) * ratio_BT)
        loss_BT = jnp.where(there_BT, smoothed(beta * margin_BT), 0.0)
        return found | {"loss": Term(jnp.sum(loss_BT), prepared.totals["places"])}

    return objective._replace(prepare=prepare, terms=terms)


def aligned(batch: Mapping[str, jax.Array], values_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d x of the i-th token of a chosen answer less that of the i-th token of its rejected one.

    Returns:
      The differences, float32 [B, T], pair after pair and place after place, and whether one of
      the two answers has a token there. A place that only one answer has counts 0 for the other.
    """
    ids_BT = batch["pair_ids"]
    weights = side_weights(batch)
    live_BP = are_pairs(batch)
    of_pair_BT = jnp.take_along_axis(live_BP, jnp.maximum(ids_BT, 0), axis=1)
    counts = pair_sums({**batch, "weights": _ones(batch)}, jnp.ones_like(values_BT))
    # A pair has as many slots as tokens: at least as many as its longer answer.
    starts_BP = _before(counts.chosen + counts.rejected)
    found = []
    for side_BT, count_BP in zip(weights, counts, strict=True):
        token_BT = side_BT != 0
        index_BT = jnp.cumsum(token_BT, axis=1) - 1
        first_BP = starts_BP - _before(count_BP)
        slot_BT = index_BT + jnp.take_along_axis(first_BP, jnp.maximum(ids_BT, 0), axis=1)
        token_BT &= of_pair_BT
        slot_BT = jnp.where(token_BT, slot_BT.astype(jnp.int32), token_BT.shape[1])
        selected_BT = jnp.where(token_BT, values_BT, 0.0)
        found.append((_scatter(slot_BT, side_BT * selected_BT), _scatter(slot_BT, token_BT)))
    (chosen_BT, has_chosen_BT), (rejected_BT, has_rejected_BT) = found
    return chosen_BT - rejected_BT, (has_chosen_BT != 0) | (has_rejected_BT != 0)


def _ones(batch) -> jax.Array:
    return jnp.where(batch["weights"] != 0, 1.0, 0.0)


def _before(counts_BP: jax.Array) -> jax.Array:
    """Sums over the pairs before a pair."""
    return jnp.cumsum(counts_BP, axis=1) - counts_BP


def _scatter(slots_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """Each value at its slot; those at T are dropped."""

    def of_row(slots_T, values_T):
        return jnp.zeros(values_T.shape, jnp.float32).at[slots_T].add(values_T, mode="drop")

    return jax.vmap(of_row)(slots_BT, values_BT.astype(jnp.float32))
