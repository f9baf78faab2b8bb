"""Inverted hinge loss (arXiv 2408.06621): a trained run forgets what it was trained on.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/inverted_hinge
Command: python -m launch.train --config=configs/losses/inverted_hinge.py
         --workdir=runs/inverted_hinge
         python -m launch.evaluate --model=runs/inverted_hinge --split=train
Against: configs/weightings/sat_imp.py:ga, gradient ascent over the same steps
Cost:    2 minutes on 2 CPU cores, most of it before.

Claim: 1 + p - the largest other probability forgets a token by making another one likelier, and is
bounded, where gradient ascent raises the loss without end and ruins the rest. The tables have not
been checked here. After 20 steps the negative log-likelihood of the training split is 1.13 nats,
where gradient ascent has 0.54 and the run had 0.002 (one seed): bounded is not slow.

The low-rank initialisation of the paper (FILA) and its retain term are not here.
"""

from ml_collections import ConfigDict

from configs.weightings import sat_imp


def get_config() -> ConfigDict:
    """Returns the config."""
    config = sat_imp.forgetting()
    config.objective.loss = "inverted_hinge"
    return config
