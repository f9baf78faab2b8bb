"""One-token rollout (arXiv 2509.26313): draws of the model at every token, rewarded if right.

Before:  the data of configs/answers.py, and 200 steps of plain training to begin with:
         python -m launch.train --config=configs/losses/one_token_rollout.py
         --workdir=runs/one_token_rollout --config.objective.loss=cross_entropy
         --config.train.steps=200
Command: python -m launch.train --config=configs/losses/one_token_rollout.py
         --workdir=runs/one_token_rollout
         python -m launch.evaluate --model=runs/one_token_rollout --corpus=runs/right.jsonl
Against: configs/weightings/dft.py, whose gradient is its expectation at temperature 1, divided by
         1 - beta
Cost:    5 minutes on 2 CPU cores: the head is passed over twice, and 64 draws a token are sorted.

Claim: a policy gradient of one token makes fine-tuning on-policy and generalises better. The tables
have not been checked here. At temperature 1 it is DFT with noise, and must not beat it by more than
that. UNCONFIRMED: temperature and beta; the paper draws 256.
"""

from ml_collections import ConfigDict

from configs import answers


def get_config() -> ConfigDict:
    """Returns the config."""
    config = answers.get_config()
    config.data.corpus = "runs/noisy.jsonl"
    config.objective.loss = "one_token_rollout"
    config.objective.one_token_rollout.update(samples=64, temperature=1.0, beta=-0.1)
    return config
