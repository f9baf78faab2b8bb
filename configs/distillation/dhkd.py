"""Dual-head distillation: the teacher has a head of the student to itself.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/dhkd.py:runs/quickstart
         --workdir=runs/dhkd
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above.

Claim: a second head keeps what the teacher's logits ask for from harming the first, which learns
the labels; released as code (penghui-yang/DHKD), no arXiv number is confirmed. The tables, of
images, have not been checked here. alpha is ours: the loss is a sum over 1,024 tokens, where the
published values are of 100 and 1,000 classes.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.loss = "dhkd"
    config.objective.dhkd.alpha = 0.01
    return config
