"""What the losses of pairs have in common: sums over answers, terms and metrics.

B rows, T tokens, P pairs of a row (see `objectives.preference.answers`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.losses.base import CROSS_ENTROPY, Loss
from objectives.objective import Objective, Prepared
from objectives.preference.answers import (
    KEYS,
    Sides,
    are_pairs,
    lengths,
    pair_sums,
    side_weights,
)
from objectives.terms import Term, masked_sum
from objectives.weighting.base import reference

REFERENCE = "reference_nll"


class Pairs(NamedTuple):
    """What a loss reads of the pairs; sides of float32 [B, P], 0 where there is no pair.

    Attributes:
      log_p: sum(d log p) of an answer, nats.
      log_ratio: sum(d m (log p - log p_reference)), m the multiplier of a token; without a
        reference sum(d m log p).
      lengths: sum(d), and 1 where there is no pair.
      live_BP: whether there is a pair.
      further: sums over the answers that a method adds, by name.
    """

    log_p: Sides
    log_ratio: Sides
    lengths: Sides
    live_BP: jax.Array
    further: Mapping[str, Sides] = {}


class Verdict(NamedTuple):
    """What a loss says of the pairs, float32 [B, P]; where there is no pair it may be anything.

    Attributes:
      loss_BP: what is minimised of a pair.
      rewards: implicit rewards of both answers. Their difference is reported as "margin", and its
        sign as "accuracy".
    """

    loss_BP: jax.Array
    rewards: Sides


# (pairs) -> verdict
Judge = Callable[[Pairs], Verdict]
# (aux, batch, references) -> [B, T] float32, of every token
Multiplier = Callable[..., jax.Array]
# (statistics, aux, batch, references) -> {name: [B, T]}
Values = Callable[..., dict[str, jax.Array]]
# (pairs, statistics, batch, totals) -> further terms
Further = Callable[..., dict[str, Term]]


def pairwise(
    judge: Judge,
    *,
    references: tuple[str, ...] = (REFERENCE,),
    multiplier: Multiplier | None = None,
    values: Values | None = None,
    further: Further | None = None,
    loss: Loss = CROSS_ENTROPY,
    coefficient: float = 1.0,
) -> Objective:
    """The mean over the pairs of the whole batch of what `judge` makes of each.

    Log-ratios are against "reference_nll" where it is among the references. Nothing is read of the
    statistics of the whole batch: micro-batches cost no second pass.

    Terms: "loss", and those of `further`. Only reported: "reward_chosen", "reward_rejected",
    "margin", "accuracy" (a tie counts one half), "log_probability_chosen" and
    "log_probability_rejected" (of whole answers, nats: both can fall while the margin grows), and
    with a reference "log_ratio", the mean of log p - log p_reference over the tokens of both
    answers (an estimate of no divergence: the answers are not drawn from the model).

    Args:
      judge: the loss.
      references: losses of the tokens that are compared with.
      multiplier: of the log-ratio of a token, a constant to gradients; None is 1.
      values: of the tokens, whose sums over the answers `judge` finds in `Pairs.further`.
      further: terms besides.
      loss: what gives the statistics.
      coefficient: of the term "loss".
    """
    compares = REFERENCE in references

    def prepare(statistics, aux, batch, given, state, step):
        return Prepared(read_references(batch, given, references), totals(batch), state)

    def terms(statistics, aux, batch, prepared):
        known, total = prepared.rows, prepared.totals
        ratio_BT = statistics.log_probability + (known[REFERENCE] if compares else 0.0)
        multiplier_BT = None if multiplier is None else multiplier(aux, batch, known)
        pairs = read_pairs(batch, statistics, ratio_BT, multiplier_BT)
        if values is not None:
            given = values(statistics, aux, batch, known).items()
            sums = {name: _of_pairs(pair_sums(batch, x_BT), pairs.live_BP) for name, x_BT in given}
            pairs = pairs._replace(further=sums)
        verdict = judge(pairs)
        loss_term = Term(over_pairs(pairs, verdict.loss_BP), total["pairs"], coefficient)
        found = {"loss": loss_term}
        if further is not None:
            found |= further(pairs, statistics, batch, total)
        found |= pair_metrics(pairs, verdict.rewards, total["pairs"])
        if compares:
            found["log_ratio"] = mean_of_answers(batch, ratio_BT, total)
        return found

    return Objective(
        prepare,
        terms,
        loss=loss,
        batch_keys=KEYS,
        references=references,
        teachers=loss.teachers,
        differentiated=("nll", "log_probability", "other_loss"),
    )


def read_references(
    batch: Mapping[str, jax.Array], given: Mapping[str, jax.Array], names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """The named references, [B, T] and detached; 0 where a token has no weight.

    What they hold there can be NaN, which would come into a gradient as 0 * NaN.
    """
    live_BT = batch["weights"] != 0
    return {name: jnp.where(live_BT, reference(given, name), 0.0) for name in names}


def totals(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The denominators of a whole batch, float32 scalars: of the batch alone.

    Returns:
      pairs: the number of pairs.
      chosen_weight, rejected_weight: sums of d over the answers of a side.
    """
    weights = side_weights(batch)
    return {
        "pairs": jnp.sum(are_pairs(batch), dtype=jnp.float32),
        "chosen_weight": jnp.sum(weights.chosen),
        "rejected_weight": jnp.sum(weights.rejected),
    }


def read_pairs(
    batch: Mapping[str, jax.Array],
    statistics: Any,
    ratio_BT: jax.Array,
    multiplier_BT: jax.Array | None = None,
) -> Pairs:
    """The sums over the answers of a batch; `ratio_BT` are the log-ratios of its tokens."""
    live_BP = are_pairs(batch)
    if multiplier_BT is not None:
        # Selected first: a token of weight 0 may hold anything.
        live_BT = batch["weights"] != 0
        multiplier_BT = jax.lax.stop_gradient(jnp.where(live_BT, multiplier_BT, 0.0))
        ratio_BT = multiplier_BT * jnp.where(live_BT, ratio_BT, 0.0)
    return Pairs(
        _of_pairs(pair_sums(batch, statistics.log_probability), live_BP),
        _of_pairs(pair_sums(batch, ratio_BT), live_BP),
        _of_pairs(lengths(batch), live_BP, 1.0),
        live_BP,
    )


def _of_pairs(sides: Sides, live_BP: jax.Array, other: float = 0.0) -> Sides:
    return Sides(*(jnp.where(live_BP, x_BP, other) for x_BP in sides))


def over_pairs(pairs: Pairs, values_BP: jax.Array) -> jax.Array:
    """The sum over the pairs at hand."""
    return jnp.sum(jnp.where(pairs.live_BP, values_BP, 0.0))


def pair_metrics(pairs: Pairs, rewards: Sides, count: jax.Array) -> dict[str, Term]:
    """What is reported of every objective of pairs."""
    margin_BP = rewards.chosen - rewards.rejected
    reported = {
        "reward_chosen": rewards.chosen,
        "reward_rejected": rewards.rejected,
        "margin": margin_BP,
        "accuracy": 0.5 * (1.0 + jnp.sign(margin_BP)),
        "log_probability_chosen": pairs.log_p.chosen,
        "log_probability_rejected": pairs.log_p.rejected,
    }
    return {name: Term(over_pairs(pairs, x), count, 0.0) for name, x in reported.items()}


def mean_of_answers(
    batch: Mapping[str, jax.Array], values_BT: jax.Array, total: Mapping[str, jax.Array]
) -> Term:
    """The mean over the tokens of both sides, reported only."""
    weights = side_weights(batch)
    value = masked_sum(weights.chosen + weights.rejected, values_BT)
    return Term(value, total["chosen_weight"] + total["rejected_weight"], 0.0)


def mean_of_chosen(
    batch: Mapping[str, jax.Array],
    values_BT: jax.Array,
    total: Mapping[str, jax.Array],
    coefficient: float,
) -> Term:
    """The mean over the tokens of all chosen answers."""
    value = masked_sum(side_weights(batch).chosen, values_BT)
    return Term(value, total["chosen_weight"], coefficient)


def per_token(sides: Sides, of: Pairs) -> Sides:
    """Sums over answers, each divided by the length of its answer."""
    return Sides(*(x_BP / n_BP for x_BP, n_BP in zip(sides, of.lengths, strict=True)))


def scaled(sides: Sides, factor: float) -> Sides:
    """Both sides times a number."""
    return Sides(factor * sides.chosen, factor * sides.rejected)
