"""Dr. GRPO (arXiv 2503.20783): GRPO without the division by deviation and by length.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/dr_grpo.py --workdir=runs/dr_grpo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: to divide by the deviation of a group favours problems that are nearly solved or hardly ever,
and to divide by the length of an answer makes wrong answers longer. The paper's tables have not
been checked here.

Watch `response_length`.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("dr_grpo")
