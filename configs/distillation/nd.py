"""Norm and direction of hidden states beside the divergence (KD++).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/nd.py:runs/quickstart
         --workdir=runs/nd
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above.

Claim: long hidden states that point to the centre of their class make a better student of the same
teacher; released as code (WangYZ1608/Knowledge-Distillation-via-ND), no arXiv number is confirmed.
The tables, of images, have not been checked here. The student is as wide as its teacher, with a
narrower MLP.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.model.update(width=128, mlp_width=128)
    config.objective.loss = "nd"
    return config
