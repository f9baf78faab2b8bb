"""A model that has read sums for a short time: what configs/policy/grpo.py begins with.

Command: python -m launch.train --config=configs/sums.py --workdir=runs/sums
Cost:    about 1 minute on 2 CPU cores.

Ordinary training on right answers, stopped on the way: with a prompt such as `27+15=` the model
writes a number, and greedily it is the right one for less than half of the held-out sums (`solved`
in lines of kind `validation`; 0.42, 0.23 and 0.31 with seeds 0, 1 and 2). That share changes fast
here: with 4 steps more it is 0.51, 0.29 and 0.42.

Problems are made, not downloaded: data.corpus=task:sums. For other ones see docs/data.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.get_config()
    config.model.update(layers=3, width=128, mlp_width=512, activation="relu2", unroll=3)
    config.data.update(corpus="task:sums", sequence_length=64, packing="best_fit")
    config.train.update(steps=110, batch_size=32)
    config.optimizer.update(name="muon", peak_learning_rate=2e-2, adam_learning_rate=5e-3)
    config.optimizer.update(schedule="wsd", decay_fraction=0.3, final_fraction=0.0)
    config.rollouts.update(tokens=5)
    config.evaluation.update(every_steps=0, batches=0, problems=500)
    config.evaluation.update(sample_prompt="27+15=", sample_tokens=8)
    return config
