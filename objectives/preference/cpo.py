"""Contrastive preference optimisation: no reference, and the likelihood of the chosen answers."""

from objectives.objective import Objective
from objectives.preference.base import mean_of_chosen, pairwise
from objectives.preference.dpo import judge
from objectives.weighting.base import check_number


def cpo(beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Objective:
    """-log sigmoid(beta * (log p(w) - log p(l))) + alpha * (-log p of the chosen tokens).

    arXiv 2401.08417; `dpo` without a reference plus the likelihood of the chosen
    answers. log p of an answer is a sum over its tokens. The second summand is the mean over all
    tokens of chosen answers of the batch, as in TRL, reported as "chosen_nll".

    Args:
      beta: factor on the log-probabilities, above 0.
      alpha: of the likelihood of the chosen answers, at least 0; 0 is `dpo` without a reference.
      label_smoothing: share of labels that are the wrong way round, in [0, 0.5); see `dpo`.

    Raises:
      ValueError: a bad number.
    """
    check_number("alpha", alpha, least=0)

    def further(pairs, statistics, batch, totals):
        return {"chosen_nll": mean_of_chosen(batch, statistics.nll, totals, alpha)}

    return pairwise(judge(beta, label_smoothing), references=(), further=further)
