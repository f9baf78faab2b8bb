"""Rho-1 (arXiv 2404.07965): the reference has seen right answers, the data has wrong ones.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/answers
         python -m launch.score --model=runs/answers --corpus=runs/noisy.jsonl
         --output=runs/answers_on_noisy
Command: python -m launch.train --config=configs/weightings/rho1.py --workdir=runs/rho1
         python -m launch.evaluate --model=runs/rho1 --corpus=runs/right.jsonl
Against: python -m launch.train --config=configs/weightings/rho1.py --workdir=runs/noisy
         --config.objective.weighting=uniform
         python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    2 minutes a run on 2 CPU cores; the stored reference costs nothing.

Claim: the tokens whose loss exceeds that of a reference on curated data are those worth learning.
Continued pretraining of TinyLlama-1.1B on OpenWebMath: an average of 38.1 with 9 billion selected
tokens, 21.6 with all 15 billion; Mistral-7B 66.2 against 55.8. With a reference on the same data,
23.9 against 21.5: that is configs/quickstart.py with its own scores, as README has it.

Here a wrong answer has a small excess, as the reference does not expect it either. The loss on
right answers that nothing was trained on is 0.007 nats, with plain training 0.357 (one seed; the
reference itself, which has seen no wrong answer, 0.024 on its own validation split).
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.data.corpus = "runs/noisy.jsonl"
    config.objective.weighting = "rho1"
    config.objective.rho1.keep = 0.6
    config.objective.references.reference_nll = "runs/answers_on_noisy"
    return config
