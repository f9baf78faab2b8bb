"""Bounds and advantages by the entropy of a token."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def hapo(
    redistribution: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_pivot: float = 0.8,
    dual_clip: float = 10.0,
    released: bool = False,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with wider bounds and larger advantages where a token was uncertain: HAPO.

    "From Uniform to Heterogeneous", released code: starriver030515/HAPO. With h in [-1, 1] the
    relative log entropy of the sampler (`objectives.policy.entropy.relative_entropy`), ratios are
    in [1 - low (1 - h), 1 + high] where h <= 0 and in [1 - low, 1 + high (1 + h)] where h > 0.
    A is multiplied by 1 + redistribution * h: where h > 0 for ratios outside of
    (1 - low / 2, 1 + high / 2), where h <= 0 for those inside. Mean over all tokens.

    The intended form, by inference; the released code makes all h positive, see `released`. Left
    out: its temperature that varies with h in sampling, and its group statistics by token.

    Needs "behaviour_entropy" in batches.

    Args:
      redistribution: how much h scales A; 0 is off.
      clip_low, clip_high: bounds of the ratio at h = 0, above 0.
      entropy_pivot: quantile of the log entropy where h is 0, in [0, 1].
      dual_clip: largest ratio where A < 0, at least 1; 0 is none.
      released: h of the released code.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        clip="entropy",
        redistribution=redistribution,
        clip_low=clip_low,
        clip_high=clip_high,
        entropy_pivot=entropy_pivot,
        dual_clip=dual_clip,
        released=released,
        sampling_temperature=sampling_temperature,
    )
