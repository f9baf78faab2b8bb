"""Clipped ratios as weights of -A log p."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def cispo(
    clip_low: float = 0.0, clip_high: float = 4.0, sampling_temperature: float = 1.0
) -> Objective:
    """-sg[clip(r)] A log p, mean over all tokens: CISPO; no token loses its gradient.

    arXiv 2506.13585, which has no lower bound and gives no number for the upper one. A largest
    ratio of 5 is that of ScaleRL (arXiv 2510.13786), as TRL's documentation quotes it.

    Args:
      clip_low, clip_high: weights are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        surrogate="cispo",
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )


def minpro(
    clip_low: float = 0.0, clip_high: float = 0.0, sampling_temperature: float = 1.0
) -> Objective:
    """-sg[clip(r_t min(r_1, ..., r_t-1))] A log p, mean over all tokens: MinPRO.

    arXiv 2601.22718. UNCONFIRMED: the bounds, which are off by default and are to be chosen, and
    the minimum at the first token, 1 here.

    Args:
      clip_low, clip_high: weights are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        ratio="prefix_min",
        surrogate="cispo",
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )
