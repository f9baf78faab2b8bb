"""Distillation by the reverse divergence, KL(student || teacher) (arXiv 2306.13649).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/reverse.py:runs/quickstart
         --workdir=runs/reverse
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above.

Claim: a student that is too small for all that its teacher does is to keep to what the teacher
finds likely. The paper has its gains on text that the student itself writes, this config on the
corpus; its tables have not been checked here.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.distillation.divergence = "reverse"
    return config
