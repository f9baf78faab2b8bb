"""ORPO (arXiv 2403.07691): fine-tuning with an odds ratio against rejected answers.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/orpo.py --workdir=runs/orpo
         python -m launch.evaluate --model=runs/orpo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: no reference and no stage of fine-tuning before are needed, where the odds of chosen against
rejected answers stand beside the likelihood of the chosen ones. The paper's tables have not been
checked here.

Here it begins, as the others, with the model of noisy answers. Watch `log_probability_rejected`.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return dpo.without_reference("orpo")
