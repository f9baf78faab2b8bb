"""CHES: pairs of answers with similar hidden states, which lower the probability of both.

B rows, T tokens, D width, P pairs of a row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from objectives.objective import Objective, Prepared
from objectives.preference.answers import Sides, are_pairs, lengths, side_weights
from objectives.preference.base import pairwise
from objectives.preference.dpo import judge
from objectives.terms import Term
from objectives.weighting import selection

HIDDEN = "hidden"


def ches_dpo(beta: float = 0.1, keep: float = 1.0, length_normalised: bool = False) -> Objective:
    """The loss of `dpo` over the share `keep` of the pairs with the lowest CHES scores.

    arXiv 2410.08847: with H_w and H_l the sums over an answer of the hidden states in front of the
    head, each that which predicts a token of the answer, a pair has the score

      CHES = <H_w, H_l> - |H_w|^2

    The higher it is, the more the chosen answer loses probability while the margin grows. The
    paper drops the pairs of a data set with the highest scores before training, by the model that
    training begins with; here they are dropped from every batch, by the model as it is: exactly
    ceil(keep * pairs) stay, more where scores tie. Scores are constants to gradients. Their mean
    over all pairs is reported as "ches".

    Needs the reference "reference_nll".

    Args:
      beta: strength of the reference, above 0.
      keep: share of the pairs of a batch that count, in (0, 1]; 1 is `dpo`.
      length_normalised: divide <H_w, H_l> by |w| |l| and |H_w|^2 by |w|^2.

    Raises:
      ValueError: a bad number.
    """
    selection.check_share("keep", keep)
    parent = pairwise(judge(beta))

    def prepare(statistics, aux, batch, references, state, step):
        found = parent.prepare(statistics, aux, batch, references, state, step)
        states_BTD = jax.lax.stop_gradient(aux[HIDDEN])
        scores_BP = ches(batch, states_BTD, length_normalised)
        # A score that is NaN keeps its pair, whose loss then has the step skipped.
        ranked_BP = jnp.where(jnp.isnan(scores_BP), jnp.inf, -scores_BP)
        kept_BP = selection.highest(ranked_BP, are_pairs(batch), keep)
        rows = {**found.rows, "scores": scores_BP, "kept": kept_BP}
        kept = jnp.sum(kept_BP, dtype=jnp.float32)
        return Prepared(rows, {**found.totals, "kept": kept}, state, found.metrics)

    def terms(statistics, aux, batch, prepared):
        found = parent.terms(statistics, aux, batch, prepared)
        kept_BT = _of_tokens(batch, prepared.rows["kept"])
        only = {**batch, "weights": jnp.where(kept_BT, batch["weights"], 0.0)}
        loss = parent.terms(statistics, aux, only, prepared)["loss"]
        scores = jnp.sum(jnp.where(are_pairs(batch), prepared.rows["scores"], 0.0))
        return found | {
            "loss": Term(loss.sum, prepared.totals["kept"]),
            "ches": Term(scores, prepared.totals["pairs"], 0.0),
        }

    return parent._replace(
        prepare=prepare, terms=terms, whole_batch=True, taps={HIDDEN: lambda batch: ()}
    )


def ches(
    batch: Mapping[str, jax.Array], states_BTD: jax.Array, length_normalised: bool = False
) -> jax.Array:
    """CHES scores of the pairs, [B, P] float32; 0 where there is no pair. See `ches_dpo`.

    Args:
      batch: with pairs.
      states_BTD: the state at a position is that which predicts the position's target.
      length_normalised: see `ches_dpo`.
    """
    summed = Sides(*(_sums(batch, w_BT, states_BTD) for w_BT in side_weights(batch)))
    inner_BP = jnp.sum(summed.chosen * summed.rejected, -1)
    square_BP = jnp.sum(jnp.square(summed.chosen), -1)
    if length_normalised:
        counts = Sides(*(jnp.maximum(n_BP, 1.0) for n_BP in lengths(batch)))
        inner_BP /= counts.chosen * counts.rejected
        square_BP /= jnp.square(counts.chosen)
    return jnp.where(are_pairs(batch), inner_BP - square_BP, 0.0)


def _sums(batch, weights_BT, states_BTD):
    live_BT = weights_BT != 0
    x_BTD = weights_BT[..., None] * jnp.where(live_BT[..., None], states_BTD, 0.0)
    ids_BT = jnp.where(live_BT, batch["pair_ids"], 0)
    return jax.vmap(lambda x_TD, id_T: jax.ops.segment_sum(x_TD, id_T, id_T.size))(
        x_BTD.astype(jnp.float32), ids_BT
    )


def _of_tokens(batch, pairs_BP):
    ids_BT = batch["pair_ids"]
    return (ids_BT >= 0) & jnp.take_along_axis(pairs_BP, jnp.maximum(ids_BT, 0), axis=1)
