"""Harmonic losses (arXiv 2502.01628): a token is the likelier, the nearer its column of the head.

Command: python -m launch.train --config=configs/losses/harmonic.py:euclidean
         --workdir=runs/harmonic
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    3 minutes on 2 CPU cores; `bray_curtis`, no product of matrices, many times that.

The argument is `euclidean`, `cosine`, `bray_curtis` or `mahalanobis`.

Claim: with distances instead of products a model is easier to interpret, and as good; of the other
distances the cosine is reported best overall (arXiv 2603.10225, abstract). Tables have not been
checked here. UNCONFIRMED: exponents and stabilisers of all but the Euclidean one.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(argument: str = "euclidean") -> ConfigDict:
    """Returns the config of one distance."""
    config = quickstart.get_config()
    config.objective.loss = "harmonic"
    config.objective.harmonic.distance = argument
    return config
