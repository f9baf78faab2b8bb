"""Ratios of whole answers and of sentences."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def gspo(
    token_form: bool = False,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    max_log_ratio: float = 10.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with one ratio an answer, the geometric mean over its tokens: GSPO.

    arXiv 2507.18071; bounds of its section 5.1, as TRL's documentation quotes them. Mean over the
    tokens of an answer, then over answers. The two forms have the same gradient where A is that of
    the answer.

    Args:
      token_form: GSPO-token: the ratio of a token has the gradient of its own log-probability.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      max_log_ratio: largest logarithm of a ratio, above 0 and at most 80; 10 in verl.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number.
    """
    return policy(
        ratio="sequence_token" if token_form else "sequence",
        aggregation="sequence_mean",
        clip_low=clip_low,
        clip_high=clip_high,
        max_log_ratio=max_log_ratio,
        sampling_temperature=sampling_temperature,
    )


def sspo(
    sentence_ends: str = "",
    clip_low: float = 0.0,
    clip_high: float = 0.0,
    entropy_clip: bool = False,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO with one ratio a sentence, the geometric mean over its tokens: SSPO.

    arXiv 2511.04256, from its abstract and notes on it. UNCONFIRMED: the bounds, which are off by
    default, how tokens are averaged (here over an answer, then over answers), and the rule by which
    the entropy of a sentence changes the bounds. `entropy_clip` puts HAPO's rule in its place, by
    the entropy of each token, and needs "behaviour_entropy" in batches.

    Without ends of sentences an answer is one sentence, as in GSPO.

    Args:
      sentence_ends: ids of the tokens that end a sentence, as "13,198"; "" for none.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      entropy_clip: bounds by entropy, in a form of ours; needs both bounds above 0.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or list.
    """
    return policy(
        ratio="segment",
        detach_prefix=False,
        sentence_ends=sentence_ends,
        aggregation="sequence_mean",
        clip="entropy" if entropy_clip else "constant",
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )
