"""CISPO (arXiv 2506.13585): the ratio is clipped, the token keeps its gradient.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/cispo.py --workdir=runs/cispo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: rare tokens that begin a good answer have large ratios, and PPO's clip takes their gradient
away. The paper's tables have not been checked here.

Watch `clip_high`, and `entropy` against runs/grpo.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("cispo")
