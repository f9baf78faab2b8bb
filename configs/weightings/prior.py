"""PRIOR (arXiv 2505.08971): what a model without the prompt cannot guess counts more.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.score --model=runs/answers --without_context --output=runs/blind
Command: python -m launch.train --config=configs/weightings/prior.py --workdir=runs/prior
Against: configs/answers.py, at the same number of steps
Cost:    2 minutes a run on 2 CPU cores; the stored reference costs nothing.

Claim: weighting a caption's tokens by (1 - p) of a text-only model, with mean 1 in each caption,
gains 19% (with a vision encoder) and 8% (without) on average, relative (abstract).

Here the prompt is the image. Ours: the blind model is the one that was trained with prompts, read
without them; the paper trains one on captions alone.
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.objective.weighting = "prior"
    config.objective.prior.alpha = 1.0
    config.objective.references.prior_nll = "runs/blind"
    return config
