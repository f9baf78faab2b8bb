"""PPO (arXiv 1707.06347) with a value at every token (arXiv 1506.02438).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/ppo.py --workdir=runs/ppo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: a head that predicts the reward from every prefix gives each token an advantage of its own,
where GRPO gives all tokens of an answer the same. The paper's tables have not been checked here.

Watch `value_loss`, which falls, and then whether `reward` rises faster for it.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("ppo")
