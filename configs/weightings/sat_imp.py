"""SatImp and relatives (arXiv 2505.11953): a trained run forgets what it was trained on.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/sat_imp
Command: python -m launch.train --config=configs/weightings/sat_imp.py --workdir=runs/sat_imp
         python -m launch.evaluate --model=runs/sat_imp --split=train
Against: python -m launch.evaluate --model=runs/sat_imp --split=train --step=600
Cost:    2 minutes on 2 CPU cores, most of it before.

The argument is `sat_imp`, `sim_sat`, `sim_imp`, `wga` or `ga` (gradient ascent, all weights -1).
Each takes a copy of the run: forgetting goes on in its work directory, for 20 steps after step 600.

Claim: p^b1 (1 - p)^b2 on the forget loss balances saturation and importance, where plain ascent
ruins the model. Its tables have not been checked here.

The loss on the training split goes from 0.002 nats to 0.54 (ga), 0.56 (wga) and 0.01 (sat_imp), one
seed: what is known by heart has p near 1, and with a factor (1 - p) next to no gradient to forget
it by. What p^b1 is for, to stop where a token is forgotten, shows in longer runs: train.steps.

Two defaults of b2 exist, 1 (open-unlearning) and 0.1 (the authors' README), for
objective.sat_imp.beta2. The retain term is not here: what is trained on is what is forgotten.
Length and learning rate are ours.
"""

from ml_collections import ConfigDict

from configs import answers

FAMILY = ("sat_imp", "sim_sat", "sim_imp", "wga")


def get_config(argument: str = "sat_imp") -> ConfigDict:
    """Returns the config of one of the family, or of "ga".

    Raises:
      LookupError: another argument.
    """
    if argument not in (*FAMILY, "ga"):
        # ml_collections would show a ValueError with its traceback.
        raise LookupError(f"argument {argument!r} is not one of: {', '.join(FAMILY)}, ga")
    config = forgetting()
    config.objective.update(weighting=argument, normalisation="all")
    if argument == "ga":
        config.objective.weighting = "wga"
        config.objective.wga.beta = 0.0
    return config


def forgetting() -> ConfigDict:
    """Twenty more steps of a run of configs/answers.py, at a constant and lower rate."""
    config = answers.get_config()
    config.train.update(steps=620, log_every=1)
    config.optimizer.update(schedule="constant", peak_learning_rate=2e-3, adam_learning_rate=5e-4)
    config.evaluation.update(every_steps=0)
    return config
