"""Identity preference optimisation: the margin is pulled to a number, not to infinity."""

import jax.numpy as jnp

from objectives.objective import Objective
from objectives.preference.base import Verdict, pairwise, per_token, scaled
from objectives.weighting.base import check_number


def ipo(beta: float = 0.1, length_normalised: bool = False) -> Objective:
    """(u_w - u_l - 1 / (2 beta))^2, u = sum over an answer of log p - log p_reference.

    arXiv 2310.12036, equation 17, with its tau as beta; mean over the pairs of the batch. The
    paper's u is a sum over the answer; TRL divides it by the number of its tokens. Rewards are
    beta * u, so the reported margin is pulled to 1/2.

    Needs the reference "reference_nll".

    Args:
      beta: strength of the reference, above 0.
      length_normalised: divide by the number of tokens of the answer, as TRL does.

    Raises:
      ValueError: `beta` not above 0.
    """
    check_number("beta", beta, above=0)

    def judge(pairs):
        ratio = per_token(pairs.log_ratio, pairs) if length_normalised else pairs.log_ratio
        loss_BP = jnp.square(ratio.chosen - ratio.rejected - 1 / (2 * beta))
        return Verdict(loss_BP, scaled(ratio, beta))

    return pairwise(judge)
