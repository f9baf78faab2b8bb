"""The default objective: a weighted mean of one loss a token.

B batch, T length. d is the weight of the data, w that of the weighting, l the loss of a token.
"""

import jax
import jax.numpy as jnp

from objectives.cross_entropy import TokenStatistics
from objectives.losses.base import CROSS_ENTROPY, Loss
from objectives.objective import Objective, Prepared
from objectives.terms import Term, masked_sum
from objectives.weighting.base import Weighting, weight_metrics
from objectives.weighting.uniform import uniform


def weighted(
    loss: Loss = CROSS_ENTROPY, weighting: Weighting | None = None, z_loss: float = 0.0
) -> Objective:
    """sum(w * l) / sum(w) + z_loss * sum(logsumexp^2) / number of targets.

    The z-loss keeps a denominator of its own: it steadies the logits of every target, also of those
    that the weighting drops (arXiv 2204.02311, section 5). A loss with `reduce` takes the place of
    the weighted mean. A token of weight 0 contributes nothing, even if its loss is NaN; an all-zero
    batch gives 0.

    Terms: "loss"; "z_loss" where the coefficient is not 0; "nll", the mean over all targets, which
    is only reported, where it is not what is minimised. Of a loss with a teacher, the means over
    all targets of "teacher_divergence" and "teacher_agreement" are reported, too.

    Args:
      loss: of each token.
      weighting: of the tokens; that of the data by default.
      z_loss: coefficient of the mean squared log-sum-exp, at least 0.
    """
    weighting = uniform() if weighting is None else weighting

    def prepare(statistics, aux, batch, references, state, step):
        known = {**references, **aux}
        weights_BT, state, metrics = weighting.weigh(statistics, batch, known, state, step)
        if weighting.detached:
            weights_BT = jax.lax.stop_gradient(weights_BT)
        shape = weight_metrics(weights_BT, batch["weights"]) if weighting.report else {}
        metrics = metrics | shape | {"weight_sum": jnp.sum(weights_BT)}
        totals = denominators(weights_BT, batch["weights"], weighting.normaliser)
        return Prepared({"weights": weights_BT}, totals, state, metrics)

    def terms(statistics, aux, batch, prepared):
        weights_BT, totals = prepared.rows["weights"], prepared.totals
        found = {"loss": loss_term(loss, statistics, weights_BT, totals)}
        if not loss.is_nll or weighting.report:
            target_BT = (batch["weights"] != 0).astype(jnp.float32)
            found["nll"] = Term(masked_sum(target_BT, statistics.nll), totals["targets"], 0.0)
        for name in ("teacher_divergence", "teacher_agreement"):
            if (reported_BT := getattr(statistics, name)) is not None:
                target_BT = (batch["weights"] != 0).astype(jnp.float32)
                found[name] = Term(masked_sum(target_BT, reported_BT), totals["targets"], 0.0)
        if z_loss:
            # Select before squaring: the derivative of a square is 0 * NaN where the select comes
            # after.
            logsumexp_BT = jnp.where(batch["weights"] != 0, statistics.logsumexp, 0.0)
            square = jnp.sum(jnp.square(logsumexp_BT))
            found["z_loss"] = Term(square, totals["targets"], z_loss)
        return found

    passed = ("nll" if loss.is_nll else "other_loss",) + ("logsumexp",) * bool(z_loss)
    return Objective(
        prepare,
        terms,
        weighting.init,
        loss,
        whole_batch=bool(weighting.uses_statistics or weighting.taps or loss.reduce),
        differentiated=passed if weighting.detached else TokenStatistics._fields,
        batch_keys=weighting.batch_keys + ("keys",) * loss.random + loss.batch_keys,
        references=weighting.references + loss.references,
        teachers=loss.teachers,
        taps=weighting.taps,
        must_match={"prediction": loss.prediction},
    )


def denominators(
    weights_BT: jax.Array, data_weights_BT: jax.Array, normaliser: str = "kept"
) -> dict[str, jax.Array]:
    """The denominators of a whole batch; float32 scalars, constants to gradients.

    Returns:
      weight: sum(w) under the normaliser "kept", sum(d) under "all"; see
        `objectives.weighting.normalise`.
      targets: the number of targets, tokens with d != 0.
    """
    divisor_BT = {"kept": weights_BT, "all": data_weights_BT}[normaliser]
    return {
        "weight": jax.lax.stop_gradient(jnp.sum(divisor_BT)),
        "targets": jnp.sum(data_weights_BT != 0, dtype=jnp.float32),
    }


def loss_term(loss: Loss, statistics, weights_BT: jax.Array, totals: dict[str, jax.Array]) -> Term:
    """The weighted sum of the losses over its denominator, or what `loss.reduce` makes of all."""
    if loss.reduce is None:
        return Term(masked_sum(weights_BT, statistics.loss), totals["weight"])
    total = jnp.where(totals["weight"], totals["weight"], 1.0)
    live_BT = weights_BT != 0
    shares_BT = jnp.where(live_BT, weights_BT * (totals["targets"] / total), 0.0)
    value = loss.reduce(jnp.where(live_BT, statistics.loss, 0.0), shares_BT)
    return Term(value, jnp.ones((), jnp.float32))
