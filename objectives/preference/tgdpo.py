"""TGDPO: DPO whose tokens are weighted by the rewards of a model that is already aligned."""

from objectives.objective import Objective
from objectives.preference.base import REFERENCE, pairwise
from objectives.preference.dpo import judge
from objectives.weighting.base import check_number


def tgdpo(alpha: float = 0.5, beta: float = 0.1) -> Objective:
    """-log sigmoid(beta * (sum over w of m * u - sum over l of m * u)), m = 1 +- alpha beta rho.

    arXiv 2506.14574, in the form of the authors' code. u = log p - log p_reference of a token, and
    rho = log p_reward - log p_reference its reward, from a model that was trained with `dpo`
    before. m is 1 + alpha beta rho at a token of the chosen answer, 1 - alpha beta rho at one of
    the rejected answer, and a constant to gradients.

    Needs the references "reference_nll" and "reward_nll".

    Args:
      alpha: of the rewards of tokens, at least 0; 0 is `dpo`.
      beta: strength of the reference, above 0.

    Raises:
      ValueError: a bad number.
    """
    check_number("alpha", alpha, least=0)

    def multiplier(aux, batch, references):
        reward_BT = references[REFERENCE] - references["reward_nll"]
        return 1 + alpha * beta * batch["sides"] * reward_BT

    references = (REFERENCE, "reward_nll")
    return pairwise(judge(beta), references=references, multiplier=multiplier)
