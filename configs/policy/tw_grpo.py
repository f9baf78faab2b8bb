"""TW-GRPO: tokens weigh more where the predictions of a group are apart (released code, no arXiv
number).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/tw_grpo.py --workdir=runs/tw_grpo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: places at which the answers of a group predict the same tell nothing about which of them is
better. The paper's tables have not been checked here.

Watch `reward` against runs/dapo, of which it is a weighted form.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("tw_grpo")
