"""A model of one million parameters on the source of Python's own standard library.

Command: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:    2 to 3 minutes on 2 CPU cores, 1 GB of memory, 2.5 million tokens (0.6 of the corpus).
Result:  1.37 bits per byte of held-out files; a byte 5-gram model with Witten-Bell backoff, fitted
         on the same files, gets 1.72 (Python 3.11; the version decides the files and the split).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.get_config()
    config.model.update(activation="relu2")
    config.data.update(tokenizer="bpe", vocab_size=1024, shuffle_rows=4096)
    config.train.update(steps=600)
    config.optimizer.update(name="muon", peak_learning_rate=2e-2, adam_learning_rate=5e-3)
    config.optimizer.update(schedule="wsd", decay_fraction=0.3, final_fraction=0.0)
    config.evaluation.update(every_steps=200, batches=0, ngram_order=5)
    return config
