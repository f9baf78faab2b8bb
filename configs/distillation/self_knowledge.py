"""Universal self-knowledge distillation: soft labels without a teacher (arXiv 2303.13005).

Command: python -m launch.train --config=configs/distillation/self_knowledge.py
         --workdir=runs/self_knowledge
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    that of the run above, and a weak head as large as the head.

Claim: a model that makes its own soft labels, by the ranks of its probabilities and of a weak head,
beats one without a teacher on images. Text instead of images, so the tables have not been checked
here. configs/weightings/uskd.py has the term of the target alone.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.name = "self_knowledge"
    return config
