"""Weights by how far the predictions of a group are apart."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def tw_grpo(
    alpha: float = 1.7,
    epsilon: float = 1e-4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    released: bool = False,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with more weight where the answers of a group predict differently: TW-GRPO.

    Released code: longmalongma/TW-GRPO, its script (other defaults of the code are 1.4 and 1.5).
    w = 1 + (alpha - 1) x, x the divergence of the group at the token's place, scaled to [0, 1] over
    the group; mean over all tokens, not divided by sum w. The divergence is that of the sampler,
    comes with the batch as "group_divergence" and has no gradient; w is of the clipped ratio alone.

    With `released`, as in the code, the divergence is that of the trained model
    (`objectives.policy.group_divergence`), w has a gradient, which lowers the divergence where the
    losses of a group add up to more than 0, and is of the divergence from the reference, too. The
    members of a group must then be in one micro-batch. In both forms minimum and maximum are over
    the drawn targets of the group; the code's are over its padding, too.

    Args:
      alpha: weight at the largest divergence, at least 0; 1 is GRPO.
      epsilon: added to the standard deviation of the rewards.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      released: the weights of the released code, which have a gradient.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        token_weight="group_divergence",
        alpha=alpha,
        epsilon=epsilon,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coefficient=kl_coefficient,
        released=released,
        sampling_temperature=sampling_temperature,
    )
