"""Dynamic loss-based reweighting of samples (arXiv 2502.06733).

Command: python -m launch.train --config=configs/weightings/dynamic.py --workdir=runs/dynamic
Against: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    3 minutes on 2 CPU cores, as the quickstart.

The argument is `lin_upper`, `quadratic` or `extremes`: configs/weightings/dynamic.py:quadratic.

Claim: pretraining loses little by low-loss samples: with LinUpper, which only takes weight from
them, models train faster and end better than with uniform weights. Its tables have not been checked
here. It begins with uniform weights for 1,000 of 20,000 steps: 30 of 600 here. r = 1 is that of its
small models. A sample is a row of 256 tokens, where the paper has 512.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(argument: str = "lin_upper") -> ConfigDict:
    """Returns the config of one strategy."""
    config = quickstart.get_config()
    config.objective.weighting = "dynamic"
    config.objective.dynamic.update(strategy=argument, temperature=1.0, burn_in=30)
    return config
