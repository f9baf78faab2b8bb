"""KTO (arXiv 2402.01306): answers that are wanted or not, without pairs.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/kto.py --workdir=runs/kto
         python -m launch.evaluate --model=runs/kto --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: a sign for each answer is enough, if the loss is one of a human's utility about a reference
point. The paper's tables have not been checked here.

The pairs are read as single answers; a file of prompt, completion and label does as well. Each
record comes with its answers under the prompt of another record, from which the reference point is
estimated: batches hold twice as many tokens for a pair.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("kto")
    return config
