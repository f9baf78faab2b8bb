"""TARS on text (after arXiv 2507.21584): DPO on answers of which some tokens are replaced.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/tars.py --workdir=runs/tars
         python -m launch.evaluate --model=runs/tars --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: a preference that holds while tokens change is no preference for a phrase. In the paper, on
models of images and text, rates of hallucination go from 26.4% to 13.2%; not been checked here.

What concerns images is not here. An answer has two or three digits: a share of 0.05 replaces few.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("tars")
    return config
