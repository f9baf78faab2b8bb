"""DAPO (arXiv 2503.14476): a higher upper bound, the mean over all tokens, groups without a signal
drawn again.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/dapo.py --workdir=runs/dapo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: equal bounds for likely and unlikely tokens lower the entropy, and groups in which all
answers are right or wrong teach nothing. The paper's tables have not been checked here.

Watch `entropy` against runs/grpo, and `replaced_groups`.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = grpo.start("dapo")
    config.rollouts.dynamic = 2
    return config
