"""IcePop (arXiv 2510.18855) for answers of a quantized model.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/icepop.py --workdir=runs/icepop
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: sampler and trainer may compute differently; tokens that get too different probabilities from
the two are left out. Here both are the same model, so that k is 1 in the first step on a rollout:
this config shows the method, not its use. The paper's tables have not been checked here.

Watch `kl_behaviour_k3`, 0 in the first step on every rollout.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("icepop")
