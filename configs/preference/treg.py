"""T-REG (arXiv 2412.02685): rewards of tokens, by contrast, regularise DPO.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.train --config=configs/answers.py --workdir=runs/wrong
         --config.data.corpus=runs/wrong.jsonl
         python -m launch.score --model=runs/answers --name=better_nll
         --corpus=runs/pairs.jsonl --output=runs/better
         python -m launch.score --model=runs/wrong --name=worse_nll
         --corpus=runs/pairs.jsonl --output=runs/worse
Command: python -m launch.train --config=configs/preference/treg.py --workdir=runs/treg
         python -m launch.evaluate --model=runs/treg --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 8 minutes on 2 CPU cores, most of it before.

Claim: what a model expects under a prompt for a better and under one for a worse answer tells which
tokens to blame. AlpacaEval 2 length-controlled 47.0 to 50.8 and Arena-Hard 35.9 to 40.3, from notes
on the paper; not been checked here.

UNCONFIRMED: see objectives/preference/treg.py. A model that adds numbers cannot be prompted: two
models stand for the two prompts, one of right and one of wrong answers, which is ours.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("treg")
    config.objective.references.update(better_nll="runs/better", worse_nll="runs/worse")
    return config
