"""A correction for samplers that compute otherwise than the trained model."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def icepop(
    k_low: float = 0.5,
    k_high: float = 5.0,
    old: str = "current",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO times k = p_old / p_sampler where k_low <= k <= k_high, and 0 elsewhere: IcePop.

    arXiv 2510.18855. Both are of the same parameters, and differ by what the sampler computes in
    another way, as where it has fewer bits. Mean over all tokens.

    In the first step on what was drawn the policy itself, without gradient, is p_old. It is that in
    every step with `old` = "current": exact with one step, while in later ones k holds how far the
    policy has moved as well and r stays 1, so that the loss is -sg[k] A log p within the bounds of
    k. "stored" reads "old_log_probability" of batches, log p before the first step, and is exact
    with any number of steps.

    Args:
      k_low, k_high: bounds of k; the paper found 2 unstable as the upper one.
      old: current | stored.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    return policy(
        token_weight="icepop",
        k_low=k_low,
        k_high=k_high,
        old=old,
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )
