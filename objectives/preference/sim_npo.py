"""SimNPO: forgetting without a reference, by the mean log-probability of a token."""

import jax

from objectives.objective import Objective
from objectives.preference.base import per_token, scaled
from objectives.preference.npo import unlearning
from objectives.weighting.base import check_number


def sim_npo(
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
    retain: str = "nll",
) -> Objective:
    """gamma * mean of -(2 / beta) log sigmoid(beta * (-log p / |y| - delta)) + alpha * retain.

    arXiv 2410.07163, in the form and with the defaults of open-unlearning; log p of an answer is
    the sum over its tokens and |y| their number. Rejected answers are forgotten and chosen ones
    retained as in `npo`.

    Args:
      beta: factor on the mean loss of a token, above 0.
      delta: mean loss of a token from which on an answer counts as forgotten, at least 0.
      gamma: of what is forgotten, at least 0.
      alpha: of what is retained, at least 0.
      retain: nll | kl; kl needs the reference "teacher".

    Raises:
      ValueError: a bad number or name.
    """
    check_number("beta", beta, above=0)
    check_number("delta", delta, least=0)

    def forget(answers):
        rewards = scaled(per_token(answers.log_p, answers), beta)
        return -(2 / beta) * jax.nn.log_sigmoid(-rewards.rejected - beta * delta), rewards

    return unlearning(forget, (), gamma, alpha, retain)
