"""ORPO: fine-tuning on the chosen answers with an odds ratio against the rejected ones."""

import jax
import jax.numpy as jnp

from objectives.objective import Objective
from objectives.preference.answers import Sides
from objectives.preference.base import Verdict, mean_of_chosen, pairwise, per_token
from objectives.preference.dpo import smoothed
from objectives.weighting.base import check_number


def orpo(beta: float = 0.1) -> Objective:
    """-log p of the chosen tokens - beta * log sigmoid(log odds(w) - log odds(l)).

    arXiv 2403.07691, equations 4 to 7, with its lambda as beta; odds(y) = P(y) / (1 - P(y)), and
    log P(y) the mean over the tokens of an answer of log p. No reference: one stage instead of
    fine-tuning and preference optimisation.

    The first summand is the mean over all tokens of chosen answers, reported as "chosen_nll"; the
    term "loss" is the second without its beta. (TRL's first summand counts the prompt, too: its
    data has no weights of prompts.) Rewards are log P, as TRL's but for a factor.

    Args:
      beta: of the odds ratio, at least 0; 0 is fine-tuning on the chosen answers.

    Raises:
      ValueError: `beta` below 0.
    """
    check_number("beta", beta, least=0)

    def judge(pairs):
        mean = per_token(pairs.log_p, pairs)
        # Odds need probabilities below 1; where there is no pair any will do.
        safe = Sides(*(jnp.where(pairs.live_BP, x_BP, -1.0) for x_BP in mean))
        odds = Sides(*map(log_odds, safe))
        return Verdict(smoothed(odds.chosen - odds.rejected), mean)

    def further(pairs, statistics, batch, totals):
        return {"chosen_nll": mean_of_chosen(batch, statistics.nll, totals, 1.0)}

    return pairwise(judge, references=(), further=further, coefficient=beta)


def log_odds(log_p: jax.Array) -> jax.Array:
    """log(P / (1 - P)) of log P <= 0.

    A probability that is 1 in float32 counts as the largest one below, with a gradient of 0.
    """
    log_p = jnp.minimum(log_p, -jnp.finfo(jnp.float32).epsneg)
    # Each where its digits are: log(1 - P) for P near 0 and near 1 (Maechler 2012).
    small = log_p < -0.6931471805599453
    near_0 = jnp.log1p(-jnp.exp(jnp.where(small, log_p, -1.0)))
    near_1 = jnp.log(-jnp.expm1(jnp.where(small, -1.0, log_p)))
    return log_p - jnp.where(small, near_0, near_1)
