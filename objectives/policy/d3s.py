"""Learning from the answers and the tokens that say most."""

from objectives.objective import Objective
from objectives.policy.policy import policy


def d3s(
    keep_answers: int = 0,
    keep_tokens: float = 1.0,
    keep_tokens_last: float = 1.0,
    keep_tokens_steps: int = 0,
    mean_over: str = "all",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampling_temperature: float = 1.0,
) -> Objective:
    """GRPO on the answers with the most varied A and the tokens with the largest |A| H: D3S.

    From the abstract and notes on it. Of a group the `keep_answers` answers with the largest
    variance of A count, with the A of the whole group, the others have A = 0; of the tokens of the
    batch the share with the largest |A| times entropy of the sampler. The share follows a line.

    UNCONFIRMED: all numbers, so that everything is kept by default; whether what is dropped counts
    in averages; and the schedule of the number of answers, which is constant here.

    Needs "behaviour_entropy" in batches.

    Args:
      keep_answers: answers of a group; 0 keeps all.
      keep_tokens: share of tokens in the first step, in (0, 1].
      keep_tokens_last: share after `keep_tokens_steps` steps, in (0, 1].
      keep_tokens_steps: steps between both; 0 stays at the first.
      mean_over: all | kept: whether tokens that are dropped count in averages.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    return policy(
        token_weight="advantage_entropy",
        keep_answers=keep_answers,
        keep_tokens=keep_tokens,
        keep_tokens_last=keep_tokens_last,
        keep_tokens_steps=keep_tokens_steps,
        mean_over=mean_over,
        clip_low=clip_low,
        clip_high=clip_high,
        sampling_temperature=sampling_temperature,
    )
