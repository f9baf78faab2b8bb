"""GSPO (arXiv 2507.18071): one ratio an answer, the geometric mean over its tokens.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/gspo.py --workdir=runs/gspo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: rewards are of answers, so that the ratio has to be, too; ratios of single tokens are noise
that grows with the length. The paper's tables have not been checked here.

Watch `clip_low` and `clip_high`: with bounds this narrow many more tokens are clipped than in
runs/grpo, as the paper has it.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("gspo")
