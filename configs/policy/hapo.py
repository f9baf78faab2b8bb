"""HAPO: temperature, bounds, advantages by the entropy of a token (released code, no arXiv number).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/hapo.py --workdir=runs/hapo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: tokens at which the model is undecided are drawn hotter and may move further, the others
less. The paper's tables have not been checked here.

Watch `clip_low`, `clip_high` and `entropy` against runs/grpo.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("hapo")
