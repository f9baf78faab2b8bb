"""Dice and Tversky losses (arXiv 1911.02855, 1706.05721): overlap with the labels, batch by batch.

Command: python -m launch.train --config=configs/losses/overlap.py:dice --workdir=runs/dice
         python -m launch.train --config=configs/losses/overlap.py:tversky --workdir=runs/tversky
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    3 minutes a run on 2 CPU cores, as the quickstart.

Claim: where negatives outnumber positives, in tagging and in segmentation, an overlap is nearer to
the score that counts than cross-entropy is. The tables have not been checked here, and every token
of a text has one label among many: a worse validation loss is what to expect.

dice has alpha = 1, which takes easy tokens out; 0 is the soft Dice loss. UNCONFIRMED: the defaults
of tversky (see objectives/losses/overlap.py).
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(argument: str = "dice") -> ConfigDict:
    """Returns the config of "dice" or "tversky"."""
    config = quickstart.get_config()
    config.objective.loss = argument
    config.objective.dice.alpha = 1.0
    return config
