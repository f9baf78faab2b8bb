"""KTO: answers that are wanted or unwanted, without pairs, against a reference point."""

import jax
import jax.numpy as jnp

from objectives.objective import Objective, Prepared
from objectives.preference.answers import KEYS, Sides, sums_by_number
from objectives.preference.base import REFERENCE, mean_of_answers, read_references, scaled
from objectives.preference.unpaired import answer_metrics, over_answers, read_answers, totals
from objectives.terms import Term
from objectives.weighting.base import check_name, check_number

MISMATCHED = "mismatched_ids"


def kto(
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_point: str = "mismatched",
) -> Objective:
    """Mean over answers of weight * (1 - sigmoid(+-beta * (u - z0))): + wanted, - unwanted.

    arXiv 2402.01306. u = sum over an answer of log p - log p_reference, and z0 the
    mean of u over answers that were put under the prompts of others, at least 0 and a constant to
    gradients: an estimate of the divergence from the reference. It is that of the whole batch, and
    reported as "reference_point".

    With the reference point "zero" z0 = 0, the unpaired form of APO-zero (arXiv 2408.06266) as TRL
    has it, and batches need no mismatched answers.

    Needs the reference "reference_nll" and, for its reference point, "mismatched_ids" in batches.

    Args:
      beta: strength of the reference, above 0.
      desirable_weight: of wanted answers, at least 0; with uneven numbers of both sides the paper
        balances them by these weights.
      undesirable_weight: of unwanted answers, at least 0.
      reference_point: mismatched | zero.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("beta", beta, above=0)
    check_number("desirable_weight", desirable_weight, least=0)
    check_number("undesirable_weight", undesirable_weight, least=0)
    check_name("reference_point", reference_point, ("mismatched", "zero"))
    mismatched = reference_point == "mismatched"

    def prepare(statistics, aux, batch, references, state, step):
        rows = read_references(batch, references, (REFERENCE,))
        point = jnp.zeros((), jnp.float32)
        if mismatched:
            point = estimate(
                batch, jax.lax.stop_gradient(statistics.log_probability), rows[REFERENCE]
            )
        total = {**totals(batch), "point": point}
        return Prepared(rows, total, state, {"reference_point": point})

    def terms(statistics, aux, batch, prepared):
        total = prepared.totals
        ratio_BT = statistics.log_probability + prepared.rows[REFERENCE]
        answers = read_answers(batch, statistics, ratio_BT)
        rewards = scaled(answers.log_ratio, beta)
        point = beta * total["point"]
        losses = Sides(
            desirable_weight * (1 - jax.nn.sigmoid(rewards.chosen - point)),
            undesirable_weight * (1 - jax.nn.sigmoid(point - rewards.rejected)),
        )
        value = sum(over_answers(answers, losses))
        found = {"loss": Term(value, total["chosen"] + total["rejected"])}
        found |= answer_metrics(answers, rewards, total)
        return found | {"log_ratio": mean_of_answers(batch, ratio_BT, total)}

    return Objective(
        prepare,
        terms,
        whole_batch=mismatched,
        differentiated=("nll", "log_probability"),
        batch_keys=(*KEYS, MISMATCHED) if mismatched else KEYS,
        unpaired=True,
        references=(REFERENCE,),
    )


def estimate(
    batch: dict[str, jax.Array], log_probability: jax.Array, reference_nll: jax.Array
) -> jax.Array:
    """max(0, mean over the mismatched answers of sum(d (log p - log p_reference))), a scalar.

    0 for a batch without such answers.

    Args:
      batch: of the whole step.
      log_probability: [B, T], log p.
      reference_nll: [B, T], -log p_reference.
    """
    ids_BT, weights_BT = batch[MISMATCHED], batch["weights"]
    sums_BP = sums_by_number(ids_BT, weights_BT, log_probability + reference_nll)
    targets_BT = jnp.where(weights_BT != 0, 1.0, 0.0)
    there_BP = sums_by_number(ids_BT, targets_BT, jnp.ones_like(weights_BT)) > 0
    count = jnp.maximum(jnp.sum(there_BP, dtype=jnp.float32), 1.0)
    return jnp.maximum(jnp.sum(sums_BP) / count, 0.0)
