"""TGDPO (arXiv 2506.14574): a model that DPO has trained says which tokens matter.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
         python -m launch.train --config=configs/preference/dpo.py --workdir=runs/dpo
Command: python -m launch.train --config=configs/preference/tgdpo.py --workdir=runs/tgdpo
         python -m launch.evaluate --model=runs/tgdpo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/dpo --corpus=runs/right.jsonl
Cost:    about 4 minutes on 2 CPU cores, most of it before.

Claim: multipliers from the rewards of tokens of an aligned model make DPO faster and better. The
paper's tables have not been checked here.

Watch `margin` against that of runs/dpo.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("tgdpo")
    config.objective.references.reward_nll = "runs/dpo"
    return config
