"""Ratios of prefixes, with bounds that grow with the prefix."""

from objectives.objective import Objective
from objectives.policy.policy import policy
from objectives.weighting.base import check_name

# Name of a ratio -> power of the place in its bounds.
_POWERS = {"cumulative": 0.5, "cumulative_mean": -0.5, "token": 0.0}


def ctpo(
    ratio: str = "cumulative",
    clip_low: float = 0.025,
    clip_high: float = 0.05,
    aggregation: str = "token_mean",
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with the ratio of the prefix up to a token, log r in [-low t^p, high t^p]: CTPO.

    Released code: horizon-llm/CTPO. The prefix has no gradient; p is 0.5 for the product over the
    prefix, -0.5 for its geometric mean and 0 for the ratio of the token. Where A < 0, ratios above
    the upper bound are cut, too. UNCONFIRMED: how tokens are averaged.

    Args:
      ratio: cumulative | cumulative_mean | token.
      clip_low, clip_high: bounds of log r at the first token, at least 0.
      aggregation: token_mean | sequence_mean | sequence_sum | fixed_length | sign_balanced.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    check_name("ratio", ratio, tuple(_POWERS))
    return policy(
        ratio=ratio,
        clip="position",
        clip_low=clip_low,
        clip_high=clip_high,
        clip_power=_POWERS[ratio],
        aggregation=aggregation,
        sampling_temperature=sampling_temperature,
    )
