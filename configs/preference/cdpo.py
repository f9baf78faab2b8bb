"""cDPO (arXiv 2411.19943): of a rejected answer the critical tokens count.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.train --config=configs/answers.py --workdir=runs/wrong
         --config.data.corpus=runs/wrong.jsonl
         python -m launch.score --model=runs/answers --against=runs/wrong
         --corpus=runs/pairs.jsonl --output=runs/contrast_of_pairs
Command: python -m launch.train --config=configs/preference/cdpo.py --workdir=runs/cdpo
         python -m launch.evaluate --model=runs/cdpo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 8 minutes on 2 CPU cores, most of it before.

Claim: in a wrong solution a few tokens decide; a contrast of a model of right solutions with one of
wrong solutions finds them. The paper's tables have not been checked here.

Here the digit that is wrong is critical, those that both answers share are not. The loss of the
released code is objective.cdpo.per_position=True.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("cdpo")
    config.objective.references.contrast_probability = "runs/contrast_of_pairs"
    return config
