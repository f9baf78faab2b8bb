"""Fault-aware tuning (arXiv 2503.16913): the digits that tell a right answer from a wrong one.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.score --model=runs/answers --faulty=runs/wrong.jsonl
         --output=runs/faults
Command: python -m launch.train --config=configs/weightings/fait.py --workdir=runs/fait
Against: configs/answers.py, at the same number of steps
Cost:    2 minutes a run on 2 CPU cores; the stored reference costs nothing.

Claim: 6.9% more pass@1 on average after one epoch of code tuning (abstract).

UNCONFIRMED: the form of the weight, which is ours (see objectives/weighting/fait.py). Ours as well:
the likelihood of the faulty answer is that of a trained run, fixed, where the paper's changes with
the model.
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.objective.weighting = "fait"
    config.objective.fait.strength = 1.0
    config.objective.references.update(
        error_mask="runs/faults", faulty_log_probability="runs/faults"
    )
    return config
