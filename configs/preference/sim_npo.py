"""SimNPO (arXiv 2410.07163): forgetting by the mean loss of a token, without a reference.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/sim_npo.py --workdir=runs/sim_npo
         python -m launch.evaluate --model=runs/sim_npo --corpus=runs/wrong.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/wrong.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: a reference makes NPO forget short answers and answers that are known well in the wrong
measure; the mean loss of a token does not. The paper's tables have not been checked here.

The rejected answers are what is forgotten, as in configs/preference/npo.py.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return dpo.without_reference("sim_npo")
