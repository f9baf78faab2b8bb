"""CPO (arXiv 2401.08417): DPO without a reference, and the likelihood of the chosen answers.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/cpo.py --workdir=runs/cpo
         python -m launch.evaluate --model=runs/cpo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: a uniform reference halves memory and time, and the likelihood of the chosen answers keeps
them from falling. The paper's tables have not been checked here.

Watch `log_probability_chosen`, with objective.cpo.alpha=0 beside it.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return dpo.without_reference("cpo")
