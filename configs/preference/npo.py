"""NPO (arXiv 2404.05868): wrong answers are forgotten, right ones retained.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/npo.py --workdir=runs/npo
         python -m launch.evaluate --model=runs/npo --corpus=runs/wrong.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/wrong.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: gradient ascent ruins a model; weighted by how far an answer is forgotten it comes to rest.
The paper's tables have not been checked here.

The rejected answers are what is forgotten. objective.npo.retain=kl, with
objective.references.teacher=runs/noisy, retains by the divergence from the model before.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("npo")
    return config
