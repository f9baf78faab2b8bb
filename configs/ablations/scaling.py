"""Runs of several sizes and lengths, for the laws of launch.ablate --fit.

Command: python -m launch.ablate --config=configs/ablations/scaling.py --workdir=runs/scaling
Fit:     python -m launch.ablate --fit=runs/scaling/results.csv --output=scaling.html
Cost:    24 runs of 15 to 60 seconds on one CPU core.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config() -> ConfigDict:
    """Returns the ablation; its baseline is the smallest and shortest run."""
    groups = [
        ablation.zipped(
            {"model.width": [24, 40, 56, 72], "model.mlp_width": [96, 160, 224, 288]},
            {"train.steps": steps},
        )
        for steps in (200, 600, 1800)
    ]
    variants = {
        f"width={keys['model.width']},steps={keys['train.steps']}": keys
        for group in groups
        for keys in group.values()
    }
    return ablation.make(
        small.get_config("tiny"),
        variants,
        seeds=(0, 1),
        baseline="width=24,steps=200",
        match="none",
    )
