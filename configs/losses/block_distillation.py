"""Distillation of full attention into attention in blocks (arXiv 2605.15913).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/losses/block_distillation.py
         --workdir=runs/block_distillation
Against: the teacher, runs/quickstart, which sees everything
Cost:    4 minutes on 2 CPU cores: the teacher's forward pass comes on top.

Claim: a frozen teacher with full attention teaches a student whose tokens see their own block and
are all seen by the last block only. UNCONFIRMED: any number of the paper; its sink tokens and block
dropout are not here. The student begins untrained, where the paper's begins as its teacher.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.loss = "block_distillation"
    config.objective.block_distillation.block_length = 64
    config.objective.references.teacher = "runs/quickstart"
    return config
