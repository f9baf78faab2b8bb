"""Tokens that blocks of attention harm most count more, in a distillation (arXiv 2605.15913).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/weightings/block_sensitive.py
         --workdir=runs/block_sensitive
Against: python -m launch.train --config=configs/losses/block_distillation.py
         --workdir=runs/block_distillation
Cost:    5 minutes on 2 CPU cores: the teacher's forward pass for its logits and its losses.

Claim: weighting the tokens whose prediction changes under blocks brings the student nearer to full
attention. UNCONFIRMED: the form of the weight, which is ours, and any number of the paper.
"""

from ml_collections import ConfigDict

from configs.losses import block_distillation


def get_config() -> ConfigDict:
    """Returns the config."""
    config = block_distillation.get_config()
    config.objective.weighting = "block_sensitive"
    config.objective.references.full_nll = "runs/quickstart"
    return config
