"""DatasetEquity (arXiv 2308.09878): what is frequent in the data counts less.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
         python -m launch.score --model=runs/quickstart --name=likelihood
         --output=runs/quickstart_likelihood
Command: python -m launch.train --config=configs/weightings/frequency_equity.py
         --workdir=runs/frequency_equity
Against: the run above, configs/quickstart.py
Cost:    3 minutes a run on 2 CPU cores; the stored reference costs nothing.

Claim: detectors get better where a sample weighs (eta + (1 - q)^gamma) / (eta + 1), q the share of
its cluster in the data. Its tables have not been checked here.

Ours: q is the probability that a trained run gives to the token, `launch.score --name=likelihood`.
The share of a cluster of documents is the paper's reading, for text: write it with
`lm.data.scores.write`, one number for all positions of a document.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.weighting = "frequency_equity"
    config.objective.frequency_equity.update(eta=1.0, gamma=5.0)
    config.objective.references.likelihood = "runs/quickstart_likelihood"
    return config
