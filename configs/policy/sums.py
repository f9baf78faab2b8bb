"""GRPO on sums."""

from ml_collections import ConfigDict

from configs.policy import pretrain_sums


def get_config() -> ConfigDict:
    """Returns the config."""
    return start("grpo")


def start(name: str) -> ConfigDict:
    """Policy gradient of this name, from a run on sums: 24 problems a step, 8 answers each."""
    config = pretrain_sums.get_config()
    config.initialise["from"] = "runs/pretrain_sums"
    config.objective.name = name
    config.rollouts.update(group=8, tokens=5)
    config.data.sequence_length = 66  # Six times a prompt of 7 tokens with an answer of 5.
    config.train.steps = 300
    config.optimizer.update(name="adamw", peak_learning_rate=3e-4, schedule="constant")
    config.optimizer.update(warmup_steps=10, weight_decay=0.0)
    config.evaluation.update(every_steps=50, batches=1)
    return config
