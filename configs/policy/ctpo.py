"""CTPO: the ratio of the prefix, with bounds that widen with its length (code, no arXiv number).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/ctpo.py --workdir=runs/ctpo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: the ratio of a prefix is what importance sampling asks for; its spread grows with the square
root of the length, and so have its bounds to. The paper's tables have not been checked here.

Watch `clip_low` and `clip_high` against runs/grpo.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("ctpo")
