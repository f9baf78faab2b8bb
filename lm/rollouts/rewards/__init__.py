"""Rewards of sampled answers; `rollouts.rewards` names some of `REWARDS`.

One of your own is a file here and a line in `REWARDS`. Nothing here may import JAX: the process
that judges starts in a fraction of a second because it does not.
"""

from lm.rollouts.rewards.boxed_number import boxed_number
from lm.rollouts.rewards.countdown import countdown
from lm.rollouts.rewards.exact import exact
from lm.rollouts.rewards.length_penalty import length_penalty
from lm.rollouts.rewards.matches_format import matches_format
from lm.rollouts.rewards.python_tests import python_tests
from lm.rollouts.rewards.reward import Reward

REWARDS = {
    "exact": exact,
    "boxed_number": boxed_number,
    "format": matches_format,
    "length_penalty": length_penalty,
    "countdown": countdown,
    "python_tests": python_tests,
}

__all__ = ["REWARDS", "Reward"]
