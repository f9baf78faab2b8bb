"""RLOO (arXiv 2402.14740): the baseline of an answer is the mean reward of the others of its group.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/rloo.py --workdir=runs/rloo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: an unbiased baseline of the same prompt makes PPO's value head and clip needless. The paper's
tables have not been checked here.

Watch `advantage` against that of runs/grpo: it is not divided by the deviation of the group, so
that problems which are half solved count most.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("rloo")
