"""ssToken (arXiv 2510.18250): progress since the model's own average, and attention to the prompt.

Before:  the data of configs/answers.py
Command: python -m launch.train --config=configs/weightings/ss_token.py --workdir=runs/ss_token
         python -m launch.evaluate --model=runs/ss_token --corpus=runs/right.jsonl
Against: python -m launch.train --config=configs/weightings/ss_token.py --workdir=runs/noisy_ema
         --config.objective.weighting=uniform
         python -m launch.evaluate --model=runs/noisy_ema --corpus=runs/right.jsonl
Cost:    3 minutes on 2 CPU cores: the average's forward pass is a third of a step.

Claim: a history model of one's own and the last layer's attention select better than an outside
reference. Average over benchmarks, all tokens -> ssToken: Llama3.2-3B 50.35 -> 52.50 (Rho-1 51.65),
Qwen2.5-7B 59.73 -> 60.48 (numbers of a summary, not checked in the paper).

The history is the moving average, which the paper has as an option; its default is the model before
the tuning: a work directory, or its scores, as objective.references.history_nll.
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.data.corpus = "runs/noisy.jsonl"
    config.train.ema_decay = 0.98
    config.objective.weighting = "ss_token"
    config.objective.ss_token.update(keep=0.6, gamma=0.5)
    config.objective.references.history_nll = "ema"
    return config
