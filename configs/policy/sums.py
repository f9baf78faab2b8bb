"""GRPO (arXiv 2402.03300) on sums: from right answers now and then to right answers nearly always.

Before:  python -m launch.train --config=configs/policy/pretrain_sums.py
         --workdir=runs/pretrain_sums
Command: python -m launch.train --config=configs/policy/sums.py --workdir=runs/sums
Against: python -m launch.evaluate --model=runs/pretrain_sums
Cost:    about 10 minutes on 2 CPU cores.

Claim: from rewards of whole answers alone, relative to those of other answers to the same prompt
and without a value model, a policy gets better at problems that it was not trained on. The paper's
numbers have not been checked here.

Watch `solved` in lines of kind `validation`: the share of held-out sums that are answered right,
greedily. A step asks 24 problems, 8 answers each; a third of the groups have no signal at first.
Learning rates well above these undo what was learned: each step follows a few groups.
Other objectives: `start` of this file, or --config.objective.name; docs/policy.md has a table.
"""

from ml_collections import ConfigDict

from configs.policy import pretrain_sums


def get_config() -> ConfigDict:
    """Returns the config."""
    return start("grpo")


def start(name: str) -> ConfigDict:
    """The policy gradient of this name, from a run that has read sums."""
    config = pretrain_sums.get_config()
    config.initialise["from"] = "runs/pretrain_sums"
    config.objective.name = name
    config.rollouts.update(group=8, tokens=5)
    config.data.sequence_length = 66  # Six times a prompt of 7 tokens with an answer of 5.
    config.train.steps = 1500
    config.optimizer.update(name="muon", peak_learning_rate=7e-4, adam_learning_rate=1e-4)
    config.optimizer.update(schedule="constant", warmup_steps=10, weight_decay=0.0)
    config.evaluation.update(every_steps=100, batches=1)
    return config
