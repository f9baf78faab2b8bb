"""USKD's target term (arXiv 2303.13005): likely tokens count more, with the batch's mean kept at 1.

Command: python -m launch.train --config=configs/weightings/uskd.py --workdir=runs/uskd
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    3 minutes on 2 CPU cores, as the quickstart.

Claim: a classifier that weights each image by 1 + p^2 - its mean, and distils itself on the other
classes, beats one without a teacher. Its tables have not been checked here; text instead of images,
and the first term without the second, are ours.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.weighting = "uskd"
    return config
