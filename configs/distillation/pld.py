"""Plackett-Luce distillation: the student ranks tokens as the teacher does.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/pld.py:runs/quickstart
         --workdir=runs/pld
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above.

Claim: the order of the teacher, weighted by its probabilities, teaches more than the divergence.
The facts are those of the paper's text as docs/distillation.md says; its tables, of images, have
not been checked here, and no arXiv number is confirmed. The list ends after 64 tokens, which is
ours.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.loss = "pld"
    return config
