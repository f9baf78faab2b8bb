"""MinPRO (arXiv 2601.22718): the ratio of a token times the smallest of those before it.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/minpro.py --workdir=runs/minpro
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: a token is off-policy as soon as its prefix is. Its bounds are UNCONFIRMED: there are none
here. The paper's tables have not been checked here.

Watch `ratio_min` and `ratio_max`.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("minpro")
