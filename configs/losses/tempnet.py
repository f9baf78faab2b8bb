"""TempNet (arXiv 2404.04575): a small network chooses the temperature of every prediction.

Command: python -m launch.train --config=configs/losses/tempnet.py --workdir=runs/tempnet
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    4 minutes on 2 CPU cores.

Claim: a temperature for each prediction, trained along, makes language models better. The tables
have not been checked here.

rho is the divergence from uniform that a temperature aims at. The paper's 8 is of a vocabulary of
50,257, whose logarithm is 10.8; with the 1,024 entries here, 6.9, it would drive all temperatures
to the lowest. 4.5 is ours: the entropy that is left, 2.4 nats, is the loss of the quickstart. So is
the learning rate of the network, for 600 steps.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.loss = "tempnet"
    config.objective.tempnet.update(rho=4.5, learning_rate=1e-3)
    return config
