"""Plain policy gradients."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def reinforce(
    baseline: str = "batch",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """-(R - b) log p of whole answers, b the mean reward of the batch or 0: REINFORCE.

    Mean over answers of the sum over their tokens. The divergence from the reference is in the
    reward, k1. No ratio: answers count as drawn from the policy as it is.

    Args:
      baseline: none | batch.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      entropy_coefficient: of the bonus for entropy.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    return policy(
        advantage="rewards",
        baseline=baseline,
        surrogate="reinforce",
        aggregation="sequence_sum",
        kl="k1",
        kl_coefficient=kl_coefficient,
        kl_in="reward",
        entropy_coefficient=entropy_coefficient,
        sampling_temperature=sampling_temperature,
    )


def rloo(
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """-(R - mean reward of the others of the group) log p of whole answers: RLOO.

    arXiv 2402.14740. Mean over answers of the sum over their tokens. The divergence from the
    reference is in the reward, k1; here it is subtracted after the baseline, which is that of the
    rewards alone (OURS).

    Args:
      kl_coefficient: beta, at least 0; 0 needs no reference.
      entropy_coefficient: of the bonus for entropy.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        advantage="leave_one_out",
        surrogate="reinforce",
        aggregation="sequence_sum",
        kl="k1",
        kl_coefficient=kl_coefficient,
        kl_in="reward",
        entropy_coefficient=entropy_coefficient,
        sampling_temperature=sampling_temperature,
    )
