"""BCO (arXiv 2404.04656): a classifier of wanted and unwanted answers.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/bco.py --workdir=runs/bco
         python -m launch.evaluate --model=runs/bco --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: the loss of a binary classifier with the implicit reward as its logit is an upper bound of
DPO's, and needs no pairs; a shift by the mean of the rewards makes the bound tight. The paper's
tables have not been checked here.

Watch `delta`. Ratios of densities of prompts are objective.bco.match_prompts, with stored scores of
one's own.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("bco")
    return config
