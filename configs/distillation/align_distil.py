"""AlignDistil: a teacher drawn further along the line from another model.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/early
         --config.train.steps=200
Command: python -m launch.train --config=configs/distillation/align_distil.py:runs/quickstart
         --workdir=runs/align_distil
Against: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Cost:    that of the run above, and a second teacher; both have three passes over the vocabulary.

Claim: where two models differ, a student learns more of a teacher beyond the better one. The
paper's two are trained by DPO, with preferences and with these turned round (released code:
songmzhang/AlignDistil, no arXiv number is confirmed); here the second is the first after a third of
its steps, so its tables have not been checked here. beta2 is ours: the loss is divided by the
extrapolation.
"""

from ml_collections import ConfigDict

from configs.distillation import forward


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = forward.get_config(teacher)
    config.objective.loss = "align_distil"
    config.objective.align_distil.beta2 = 1.0
    config.objective.references.contrast_teacher = "runs/early"
    return config
