"""Models for ablations: hundreds of runs of less than a minute on one CPU core.

Command: python -m launch.train --config=configs/small.py:tiny --workdir=runs/tiny

`small` has 0.5 million parameters and reads 1.0 million tokens of configs/quickstart.py's text in
500 steps. `tiny` has 41 thousand parameters and reads bytes: 40 tokens a parameter in 800 steps.
AdamW, because with the quickstart's Muon 4-bit training gained nothing over rounding, see
configs/papers/compute_optimal_qat.py.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(argument: str = "small") -> ConfigDict:
    """Returns the config of "small" or "tiny".

    Raises:
      LookupError: another argument.
    """
    if argument not in ("small", "tiny"):
        raise LookupError(f"argument {argument!r} is not small or tiny")
    config = quickstart.get_config()
    config.model.update(layers=3, width=96, mlp_width=384)
    config.train.update(steps=500, batch_size=8, log_every=50, tensorboard=False)
    config.evaluation.update(every_steps=125, batches=64, ngram_order=0, sample_tokens=0)
    config.optimizer.update(name="adamw", peak_learning_rate=5e-3)
    config.quantization.gptq_batches = 0
    if argument == "tiny":
        config.model.update(layers=2, width=32, mlp_width=128)
        config.data.update(tokenizer="bytes", vocab_size=0, sequence_length=128)
        config.train.update(steps=800, batch_size=16)
        config.optimizer.update(warmup_steps=20)
        config.evaluation.update(every_steps=200)
    return config
