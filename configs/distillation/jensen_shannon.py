"""Distillation by the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/jensen_shannon.py:runs/quickstart
         --workdir=runs/jensen_shannon
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above, and one pass over the vocabulary more than the forward divergence.

Claim: between the forward and the reverse divergence lies a better one, which depends on the task.
The paper's tables, on text that the student itself writes, have not been checked here. `mixing`
goes from the forward divergence, near 0, to the reverse one, near 1.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.distillation.divergence = "jensen_shannon"
    return config
