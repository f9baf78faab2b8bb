"""D3S: answers with the most varied advantages, their tokens of largest abs(A) H (no arXiv number).

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/d3s.py --workdir=runs/d3s
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: few answers and tokens carry the gradient, and the rest is noise. The shares of the paper are
UNCONFIRMED: 6 of 8 answers and half of the tokens are the choice of this config. The paper's tables
have not been checked here.

Watch `reward` against runs/grpo.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = grpo.start("d3s")
    config.objective.d3s.update(keep_answers=6, keep_tokens=0.5, keep_tokens_last=0.5)
    return config
