"""Temperature, bounds and advantages by the entropy of a token."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def hapo(
    advantage: str = "token_normalised",
    redistribution: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_pivot: float = 0.8,
    temperature_tau: float = 0.05,
    dual_clip: float = 10.0,
    released: bool = False,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with temperature, advantages and bounds by the entropy of each token: HAPO.

    "From Uniform to Heterogeneous", released code: starriver030515/HAPO. With h in [-1, 1] the
    relative log entropy of the sampler (`objectives.policy.entropy.entropy_scale`):

      temperature  that of the rollouts times 1 + temperature_tau h, h on the scale of the batch
                   before and 0 in the first; log p in training is of the same distribution
      advantages   by mean and deviation over the tokens of the group (`token_normalised`), then
                   times 1 + redistribution h: where h > 0 for ratios outside of
                   (1 - low / 2, 1 + high / 2), where h <= 0 for those inside, by the token's bounds
      bounds       [1 - low (1 - h), 1 + high] where h <= 0, [1 - low, 1 + high (1 + h)] where h > 0

    Mean over all tokens.

    The intended form, by inference; the released code makes all h positive, see `released`. There,
    log p in training is at the temperature of the rollouts whatever a token was drawn with, which
    is left out: the ratios would not be those of what was drawn.

    Needs "behaviour_entropy" in batches, and logits without a soft-cap where temperatures differ.

    Args:
      advantage: token_normalised | group_normalised | centred | leave_one_out | rewards.
      redistribution: how much h scales A; 0 is off.
      clip_low, clip_high: bounds of the ratio at h = 0, above 0.
      entropy_pivot: quantile of the log entropy where h is 0, in [0, 1].
      temperature_tau: how much h scales the temperature, in [0, 1); 0 is off.
      dual_clip: largest ratio where A < 0, at least 1; 0 is none.
      released: h of the released code.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    return policy(
        advantage=advantage,
        clip="entropy",
        redistribution=redistribution,
        clip_low=clip_low,
        clip_high=clip_high,
        entropy_pivot=entropy_pivot,
        temperature_tau=temperature_tau,
        dual_clip=dual_clip,
        released=released,
        sampling_temperature=sampling_temperature,
    )
