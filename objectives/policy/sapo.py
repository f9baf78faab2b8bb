"""A soft gate in place of clipping."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def sapo(
    tau_positive: float = 1.0, tau_negative: float = 1.05, sampling_temperature: float = 1.0
) -> Objective:
    """GRPO with the gate 4 sigmoid(tau (r - 1)) / tau in place of the clipped ratio: SAPO.

    arXiv 2511.20347, as in verl and TRL. Mean over the tokens of an answer, then over answers.
    On-policy the gradient is that of GRPO; the value of the loss is another, as the gate is 2 / tau
    at r = 1.

    Args:
      tau_positive, tau_negative: slopes of the gate for A > 0 and others, above 0.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        surrogate="sapo",
        tau_positive=tau_positive,
        tau_negative=tau_negative,
        aggregation="sequence_mean",
        sampling_temperature=sampling_temperature,
    )
