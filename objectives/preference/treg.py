"""T-REG: DPO with a regulariser that tells tokens apart by contrastive prompts."""

import jax

from objectives.objective import Objective
from objectives.preference.base import REFERENCE, over_pairs, pairwise
from objectives.preference.dpo import judge
from objectives.terms import Term
from objectives.weighting.base import check_number


def treg(alpha: float = 0.25, beta: float = 0.1) -> Objective:
    """L_dpo + alpha * v * sum over both answers of -beta * r * log p.

    T-REG (arXiv 2412.02685), from notes on the paper. r = sigmoid(log p_better - log p_worse) - 1/2
    is the reward of a token: p_better and p_worse are the same model under a prompt that asks for a
    better and for a worse answer. v = sigmoid(reward(l) - reward(w)), with rewards of whole answers
    beta * sum(log p - log p_reference), makes the regulariser small for a pair that is right. r and
    v are constants to gradients. It is reported as "token_reward", without its alpha.

    UNCONFIRMED: whether the rewards of tokens come from the policy or from a frozen model; here
    they are stored. The paper's alpha is 0.1, 0.25 or 0.5.

    Needs the references "reference_nll", "better_nll" and "worse_nll", the latter two stored.

    Args:
      alpha: of the regulariser, at least 0; 0 is `dpo`.
      beta: strength of the reference, above 0.

    Raises:
      ValueError: a bad number.
    """
    check_number("alpha", alpha, least=0)

    def values(statistics, aux, batch, references):
        reward_BT = token_rewards(references["better_nll"], references["worse_nll"])
        return {"token_reward": -beta * reward_BT * statistics.log_probability}

    def further(pairs, statistics, batch, totals):
        ratio, summed = pairs.log_ratio, pairs.further["token_reward"]
        share_BP = jax.lax.stop_gradient(
            jax.nn.sigmoid(beta * ratio.rejected - beta * ratio.chosen)
        )
        value = over_pairs(pairs, share_BP * (summed.chosen + summed.rejected))
        return {"token_reward": Term(value, totals["pairs"], alpha)}

    return pairwise(
        judge(beta),
        references=(REFERENCE, "better_nll", "worse_nll"),
        values=values,
        further=further,
    )


def token_rewards(better_nll: jax.Array, worse_nll: jax.Array) -> jax.Array:
    """sigmoid(log p_better - log p_worse) - 1/2, in (-1/2, 1/2)."""
    return jax.nn.sigmoid(worse_nll - better_nll) - 0.5
