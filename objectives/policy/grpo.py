"""GRPO, and what differs from it in how tokens are averaged."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def grpo(
    ddof: int = 1,
    epsilon: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    aggregation: str = "sequence_mean",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """Clipped ratio times the reward, normalised within the group, mean over answers: GRPO.

    arXiv 2402.03300. A = (R - mean) / (std + epsilon) of the group; -min(r A, clip(r) A), mean over
    the tokens of an answer, then over answers; plus beta times k3 of the divergence from the
    reference. verl has a dual clip of 3. The paper's beta of 0.04 is from memory, UNCONFIRMED; it
    is off here, as it is in TRL.

    Args:
      ddof: 1 divides squares by G - 1, as torch does; 0 by G.
      epsilon: added to the standard deviation; some code has 1e-4.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      dual_clip: largest ratio where A < 0, at least 1; 0 is none.
      aggregation: token_mean | sequence_mean | sequence_sum | fixed_length | sign_balanced.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      entropy_coefficient: of the bonus for entropy.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    return policy(
        ddof=ddof,
        epsilon=epsilon,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        kl_coefficient=kl_coefficient,
        entropy_coefficient=entropy_coefficient,
        sampling_temperature=sampling_temperature,
    )


def dr_grpo(
    length: int = 0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO without its two biases: A = R - mean, and sums over tokens by a constant: Dr. GRPO.

    arXiv 2503.20783. Neither easy groups nor short answers count more.

    Args:
      length: constant that sums over tokens are divided by; 0 is the length of a row.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        advantage="centred",
        aggregation="fixed_length",
        length=length,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coefficient=kl_coefficient,
        sampling_temperature=sampling_temperature,
    )


def dapo(
    clip_low: float = 0.2, clip_high: float = 0.28, sampling_temperature: float = 1.0
) -> Objective:
    """GRPO with a higher upper bound and the mean over all tokens: DAPO.

    arXiv 2503.14476. No reference. What the paper changes in sampling, groups without a signal
    drawn again, is a key of the rollouts.

    Args:
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(clip_low=clip_low, clip_high=clip_high, sampling_temperature=sampling_temperature)


def balanced(
    clip_low: float = 0.2, clip_high: float = 0.2, sampling_temperature: float = 1.0
) -> Objective:
    """GRPO with token means of answers with A > 0 and A < 0 apart, each by its number of answers.

    Balanced aggregation, arXiv 2605.04077, from its abstract and notes on it: the bounds of the
    ratio are those of GRPO, UNCONFIRMED for the paper.

    Args:
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        aggregation="sign_balanced",
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )
