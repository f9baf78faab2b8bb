"""Critical tokens (cDPO, arXiv 2411.19943): forget wrong answers where they go wrong.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.train --config=configs/answers.py --workdir=runs/wrong
         --config.data.corpus=runs/wrong.jsonl
         python -m launch.score --model=runs/answers --against=runs/wrong
         --corpus=runs/wrong.jsonl --output=runs/contrast
Command: python -m launch.train --config=configs/weightings/critical_token.py --workdir=runs/wrong
         python -m launch.evaluate --model=runs/wrong --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/wrong --corpus=runs/right.jsonl --step=600
Cost:    4 minutes on 2 CPU cores, most of it before.

Claim: in a wrong solution a few tokens decide; a contrast of a model of right solutions with one of
wrong solutions finds them. The tables have not been checked here.

In the paper the score weights the rejected answers of a preference loss. Here it multiplies
gradient ascent on wrong answers (`critical_token*wga`), which is the nearest that needs no pairs:
the digit that is wrong is unlearned, the digits that both answers share are left alone.
"""

from ml_collections import ConfigDict

from configs.weightings import sat_imp


def get_config() -> ConfigDict:
    """Returns the config."""
    config = sat_imp.forgetting()
    config.data.corpus = "runs/wrong.jsonl"
    config.objective.update(weighting="critical_token*wga", normalisation="all")
    config.objective.references.contrast_probability = "runs/contrast"
    return config
