"""REINFORCE with the mean reward of the batch as its baseline (Williams, 1992; no arXiv number).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/reinforce.py --workdir=runs/reinforce
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: the log-probability of an answer, times how much better than the others it is, is all that a
policy gradient needs; no ratio, no clip, no deviation of a group. With a baseline of the whole
batch, easy problems push up and hard ones down. The paper's tables have not been checked here.

Watch `reward` rises as in runs/grpo while rollouts.reuse is 1; with reuse nothing holds a step
back.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("reinforce")
