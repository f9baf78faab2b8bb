"""IcePop (arXiv 2510.18855) where answers are drawn with 3-bit weights and full ones are trained.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/quantized_rollouts.py --workdir=runs/icepop3
Against: the same with configs/policy/quantized_rollouts.py:grpo, which corrects nothing, and
         configs/policy/icepop.py, which draws with the weights that are trained.
Cost:    that of configs/policy/grpo.py, and a pass for the old policy each rollout.

Claim: IcePop weights each token by k = p of the trained weights / p of the rounded ones, and drops
tokens with k outside [0.5, 5], so that the gradient is that of the trained model. GRPO alone takes
the rounded model for the old policy, and its ratios mix the effect of rounding with that of
training. Three seeds, 300 steps: GRPO at 3 bits forgets the sums in every seed, IcePop at 3 bits
keeps most of them and gains nothing; numbers are in docs/results/policy.md.

Watch `kl_behaviour_k3`: without rounding it is 0 in the first step on every rollout. Here the
weights are rounded in memory, which saves nothing: the config shows what a sampler of few bits
does to training, not its speed.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config(method: str = "icepop") -> ConfigDict:
    """Returns the config of a method of this folder, "icepop" or another."""
    config = grpo.start(method or "icepop")
    config.objective.icepop.old = "stored"
    config.rollouts.bits = 3.0
    return config
