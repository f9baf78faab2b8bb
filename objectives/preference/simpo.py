"""SimPO: mean log-probabilities as rewards, no reference, and a margin that is aimed at."""

from objectives.objective import Objective
from objectives.preference.base import Verdict, pairwise, per_token, scaled
from objectives.preference.dpo import check_smoothing, smoothed
from objectives.weighting.base import check_number


def simpo(beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> Objective:
    """-log sigmoid(beta * (log p(w) / |w| - log p(l) / |l|) - gamma).

    arXiv 2405.14734. Rewards are beta times the mean log-probability of a token, so the
    reported margin is aimed at gamma. gamma = 0 is `dpo` without a reference, length-normalised.

    Args:
      beta: factor on the mean log-probabilities, above 0; the paper's are 2 and above.
      gamma: margin that is aimed at, at least 0; 0.5 is TRL's, the paper tunes it by model.
      label_smoothing: share of labels that are the wrong way round, in [0, 0.5); see `dpo`.

    Raises:
      ValueError: a bad number.
    """
    check_number("beta", beta, above=0)
    check_number("gamma", gamma, least=0)
    check_smoothing(label_smoothing)

    def judge(pairs):
        rewards = scaled(per_token(pairs.log_p, pairs), beta)
        margin_BP = rewards.chosen - rewards.rejected - gamma
        return Verdict(smoothed(margin_BP, label_smoothing), rewards)

    return pairwise(judge, references=())
