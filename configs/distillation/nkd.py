"""Normalised distillation: the target apart from all other tokens (arXiv 2303.13005).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/nkd.py:runs/quickstart
         --workdir=runs/nkd
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above.

Claim: to weight the target by the teacher, and to normalise what both say of the other classes,
beats the plain divergence on images. Text instead of images, so the tables have not been checked
here.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.loss = "nkd"
    return config
