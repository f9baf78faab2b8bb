"""A model of one million parameters on the source of Python's own standard library.

Command: python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.get_config()
    config.model.update(layers=4, width=128, heads=4, kv_heads=4, mlp_width=512, unroll=4)
    config.data.update(tokenizer="bpe", vocab_size=1024)
    config.train.update(steps=600, batch_size=16)
    config.optimizer.update(name="muon", schedule="wsd")
    config.evaluation.update(ngram_order=5)
    return config
