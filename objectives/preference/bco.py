"""Binary classifier optimisation: a classifier of wanted and unwanted answers, shifted."""

import jax
import jax.numpy as jnp

from objectives.objective import Objective, Prepared
from objectives.preference.answers import KEYS, Sides, pair_sums
from objectives.preference.base import REFERENCE, mean_of_answers, read_references, scaled
from objectives.preference.unpaired import answer_metrics, over_answers, read_answers, totals
from objectives.terms import Term
from objectives.weighting.base import check_name, check_number

DESIRABLE = "desirable_probability"


def bco(
    beta: float = 0.1,
    mean_over: str = "sides",
    match_prompts: bool = False,
    lowest_ratio: float = 0.5,
    highest_ratio: float = 10.0,
) -> Objective:
    """mean over w of -log sigmoid(r - delta) + mean over l of -log sigmoid(-(r - delta)).

    arXiv 2404.04656. r = beta * sum over an answer of log p - log p_reference, and delta the mean
    of all rewards of both sides seen so far, those of this batch included; a constant to gradients,
    carried in the state and reported as "delta". For every delta the sum over a pair is at least
    the loss of `dpo`.

    With `match_prompts` an unwanted answer counts by the ratio of densities of its prompt among
    wanted and unwanted answers, P / (1 - P) within bounds, from the reference
    "desirable_probability": P, the probability that the prompt x is one of a wanted answer, stored
    at the tokens of the answer (their mean is taken). The paper fits it by a logistic regression on
    embeddings of prompts.

    Needs the reference "reference_nll".

    Args:
      beta: strength of the reference, above 0.
      mean_over: sides (two means, the paper's) | answers (one mean over all answers, TRL's).
      match_prompts: weight the unwanted answers.
      lowest_ratio: of densities, at least 0.
      highest_ratio: of densities, at least the lowest.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("beta", beta, above=0)
    check_name("mean_over", mean_over, ("sides", "answers"))
    check_number("lowest_ratio", lowest_ratio, least=0)
    check_number("highest_ratio", highest_ratio, least=lowest_ratio)
    names = (REFERENCE, *(DESIRABLE,) * match_prompts)

    def prepare(statistics, aux, batch, references, state, step):
        rows = read_references(batch, references, names)
        log_p_BT = jax.lax.stop_gradient(statistics.log_probability)
        answers = read_answers(batch, statistics, log_p_BT + rows[REFERENCE])
        total = totals(batch)
        summed = sum(over_answers(answers, scaled(answers.log_ratio, beta)))
        state = running_mean(state, summed, total["chosen"] + total["rejected"])
        delta = state["mean"]
        return Prepared(rows, {**total, "delta": delta}, state, {"delta": delta})

    def terms(statistics, aux, batch, prepared):
        total, delta = prepared.totals, prepared.totals["delta"]
        ratio_BT = statistics.log_probability + prepared.rows[REFERENCE]
        answers = read_answers(batch, statistics, ratio_BT)
        rewards = scaled(answers.log_ratio, beta)
        losses = Sides(
            -jax.nn.log_sigmoid(rewards.chosen - delta),
            -jax.nn.log_sigmoid(delta - rewards.rejected),
        )
        if match_prompts:
            p_BP = pair_sums(batch, prepared.rows[DESIRABLE]).rejected / answers.lengths.rejected
            ratio_BP = density_ratio(p_BP, lowest_ratio, highest_ratio)
            losses = losses._replace(rejected=ratio_BP * losses.rejected)
        sums = over_answers(answers, losses)
        if mean_over == "answers":
            found = {"loss": Term(sum(sums), total["chosen"] + total["rejected"])}
        else:
            # One term, so that the reported loss is what is minimised.
            counts = (jnp.maximum(total[side], 1.0) for side in ("chosen", "rejected"))
            parts = (value / count for value, count in zip(sums, counts, strict=True))
            found = {"loss": Term(sum(parts), jnp.ones((), jnp.float32))}
        found |= answer_metrics(answers, rewards, total)
        return found | {"log_ratio": mean_of_answers(batch, ratio_BT, total)}

    return Objective(
        prepare,
        terms,
        init=lambda: {"mean": jnp.zeros((), jnp.float32), "count": jnp.zeros((), jnp.float32)},
        whole_batch=True,
        differentiated=("nll", "log_probability"),
        batch_keys=KEYS,
        unpaired=True,
        references=names,
    )


def running_mean(
    state: dict[str, jax.Array], summed: jax.Array, count: jax.Array
) -> dict[str, jax.Array]:
    """The mean and the number of all values so far, with `count` more whose sum is `summed`."""
    total = state["count"] + count
    shift = (summed - count * state["mean"]) / jnp.maximum(total, 1.0)
    return {"mean": state["mean"] + shift, "count": total}


def density_ratio(probability: jax.Array, lowest: float, highest: float) -> jax.Array:
    """P / (1 - P), within bounds."""
    ratio = probability / jnp.maximum(1 - probability, jnp.finfo(jnp.float32).eps)
    return jnp.clip(ratio, lowest, highest)
