"""Negative preference optimisation: rejected answers are forgotten, chosen ones retained."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from objectives.distillation.taught import taught_statistics
from objectives.losses.base import CROSS_ENTROPY, Loss
from objectives.objective import Objective, Prepared
from objectives.preference.answers import KEYS, Sides
from objectives.preference.base import (
    REFERENCE,
    mean_of_answers,
    mean_of_chosen,
    read_references,
    scaled,
)
from objectives.preference.unpaired import Answers, answer_metrics, read_answers, totals
from objectives.terms import Term
from objectives.weighting.base import check_name, check_number

TEACHER = "teacher"


def npo(
    beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0, retain: str = "nll"
) -> Objective:
    """gamma * mean over forgotten answers of -(2 / beta) log sigmoid(-beta * u) + alpha * retain.

    arXiv 2404.05868. u = sum over an answer of log p - log p_reference; the loss of
    `dpo` without a chosen answer, on the rejected answers. Its gradient is that of gradient ascent
    times 2 p^beta / (p^beta + p_reference^beta), which is 1 at first and 0 once an answer is
    forgotten.

    The chosen answers are what is retained, by their mean loss of a token, or by the mean of
    KL(p_teacher || p) over their tokens, reported as "retain". A batch may have answers of one side
    alone. The term "loss" is the first summand without its gamma.

    Needs the reference "reference_nll", and "teacher" to retain by divergence.

    Args:
      beta: strength of the reference, above 0; to 0 it is gradient ascent.
      gamma: of what is forgotten, at least 0.
      alpha: of what is retained, at least 0.
      retain: nll | kl.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("beta", beta, above=0)

    def forget(answers):
        rewards = scaled(answers.log_ratio, beta)
        return -(2 / beta) * jax.nn.log_sigmoid(-rewards.rejected), rewards

    return unlearning(forget, (REFERENCE,), gamma, alpha, retain)


def unlearning(
    forget: Callable[[Answers], tuple[jax.Array, Sides]],
    references: tuple[str, ...],
    gamma: float,
    alpha: float,
    retain: str,
) -> Objective:
    """gamma * mean of `forget` over the rejected answers + alpha * retain; see `npo`.

    Args:
      forget: (answers) -> (loss of the rejected ones [B, P], rewards).
      references: what log-ratios are against; () for none.
      gamma: of what is forgotten.
      alpha: of what is retained.
      retain: nll | kl.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("gamma", gamma, least=0)
    check_number("alpha", alpha, least=0)
    check_name("retain", retain, ("nll", "kl"))
    loss = taught() if retain == "kl" else CROSS_ENTROPY

    def prepare(statistics, aux, batch, given, state, step):
        return Prepared(read_references(batch, given, references), totals(batch), state)

    def terms(statistics, aux, batch, prepared):
        total = prepared.totals
        ratio_BT = statistics.log_probability + sum(prepared.rows.values())
        answers = read_answers(batch, statistics, ratio_BT)
        loss_BP, rewards = forget(answers)
        value = jnp.sum(jnp.where(answers.there.rejected, loss_BP, 0.0))
        found = {
            "loss": Term(value, total["rejected"], gamma),
            "retain": mean_of_chosen(batch, statistics.loss, total, alpha),
        }
        found |= answer_metrics(answers, rewards, total)
        if references:
            found["log_ratio"] = mean_of_answers(batch, ratio_BT, total)
        if retain == "kl":
            found["reference_kl"] = mean_of_answers(batch, statistics.other_loss, total)
        return found

    return Objective(
        prepare,
        terms,
        loss=loss,
        differentiated=("nll", "log_probability", "other_loss"),
        batch_keys=KEYS,
        unpaired=True,
        references=references,
        teachers=loss.teachers,
    )


def taught() -> Loss:
    """Statistics whose `other_loss` is KL(p_teacher || p) of every token, nats."""

    def statistics(inputs):
        taught = taught_statistics(inputs)
        return taught.statistics._replace(other_loss=taught.divergence)

    return Loss(statistics=statistics, teachers=(TEACHER,))
