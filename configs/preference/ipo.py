"""IPO (arXiv 2310.12036): the margin is pulled to 1 / (2 beta), and not to infinity.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/ipo.py --workdir=runs/ipo
         python -m launch.evaluate --model=runs/ipo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: the loss of DPO is overfitted where preferences are sure: whatever beta, its margin grows
without end, and the reference is forgotten. A square that is least at a finite margin is not. The
paper's tables have not been checked here.

Watch `margin`: it goes to 1/2 here and on and on with objective.name=dpo.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("ipo")
    return config
