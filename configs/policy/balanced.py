"""Balanced aggregation (arXiv 2605.04077): token means of good and of bad answers apart.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/balanced.py --workdir=runs/balanced
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: with the mean over all tokens long wrong answers drown short right ones, with the mean over
answers a token of a long answer hardly counts. The paper's tables have not been checked here.

Watch `reward` and `response_length` against runs/grpo and runs/dapo. Where all answers are of one
length, as nearly here, the three averages differ little.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("balanced")
