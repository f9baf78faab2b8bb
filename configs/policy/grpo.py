"""GRPO (arXiv 2402.03300) on sums: from answers that are right now and then to more of them.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Against: python -m launch.evaluate --model=runs/sums
Cost:    0.32 seconds a step on 2 CPU cores beside other work, 10 minutes in all.

Claim: from rewards of whole answers alone, relative to those of other answers to the same prompt
and without a value model, a policy gets better at problems that it was not trained on. The paper's
numbers have not been checked here.

Watch `solved` in lines of kind `validation`: the share of 500 held-out sums that are answered
right, greedily. With seeds 0, 1 and 2 it went from 0.42, 0.23 and 0.31 to 0.97, 0.95 and 0.98. A
step asks 24 problems, 8 answers each; a third of the groups have no signal at first.

A rate of 2.5e-3 is worse from the first hundred steps on, and 3e-3 undoes what was learned. The
other methods of this folder train on each rollout twice, as otherwise their ratios would all be 1;
docs/policy.md compares them with this one.
"""

from ml_collections import ConfigDict

from configs import sums


def get_config() -> ConfigDict:
    """Returns the config."""
    return start("grpo", reuse=1)


def start(name: str, reuse: int = 2) -> ConfigDict:
    """The policy gradient of this name, from a run that has read sums.

    With a `reuse` of 1 a rollout is trained on once, and its ratios are all 1.
    """
    config = sums.get_config()
    config.initialise["from"] = "runs/sums"
    config.objective.name = name
    config.rollouts.update(group=8, tokens=5, reuse=reuse)
    config.data.sequence_length = 66  # Six times a prompt of 7 tokens with an answer of 5.
    config.train.steps = 1800
    config.optimizer.update(name="muon", peak_learning_rate=1.5e-3, adam_learning_rate=2e-4)
    config.optimizer.update(schedule="wsd", decay_fraction=0.5, final_fraction=0.05)
    config.optimizer.update(warmup_steps=10, weight_decay=0.0)
    config.evaluation.update(every_steps=100, batches=1)
    return config
