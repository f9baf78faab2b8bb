"""GLOW (arXiv 2601.04992): documents that do not improve between their visits count more.

Before:  the data of configs/answers.py
Command: python -m launch.train --config=configs/weightings/glow.py --workdir=runs/glow
         python -m launch.evaluate --model=runs/glow --corpus=runs/right.jsonl
Against: python -m launch.train --config=configs/weightings/glow.py --workdir=runs/noisy
         --config.objective.weighting=uniform
         python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    2 minutes a run on 2 CPU cores.

Claim: on unfiltered agent trajectories, 5.51% more out of distribution than tuning on the positive
ones alone, Qwen2.5-7B (abstract).

alpha is 2, with which a document that stands still keeps its weight; the paper has 1 and 2. Every
document is whole in a row and comes back every 20 steps or so: look at glow_mean_weight. The loss
on right answers is 0.181 nats, with plain training 0.357 (one seed).
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.data.corpus = "runs/noisy.jsonl"
    config.objective.update(weighting="glow", normalisation="all")
    config.objective.glow.update(alpha=2.0, beta=10.0)
    return config
