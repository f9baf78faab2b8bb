"""SAPO (arXiv 2511.20347): a soft gate in place of the clipped ratio.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/sapo.py --workdir=runs/sapo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: a hard bound gives all or nothing; a sigmoid of the ratio fades out. The paper's tables have
not been checked here.

Watch `reward`. The value of the loss is not that of the others, its first gradient is.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("sapo")
