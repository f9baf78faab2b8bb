"""Models for ablations: many runs of one or two minutes on 2 CPU cores.

Command: python -m launch.train --config=configs/small.py:tiny --workdir=runs/tiny

`small` is configs/quickstart.py with 400 steps of AdamW: 1.0 million parameters, 1.6 million
tokens. `tiny` has 0.1 million parameters and reads bytes: 30 tokens a parameter in 800 steps.
AdamW, because after Muon 4-bit training gained nothing over rounding in
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
    config.train.update(steps=400, tensorboard=False)
    config.evaluation.update(every_steps=100, batches=32, ngram_order=0, sample_tokens=0)
    config.optimizer.update(name="adamw", peak_learning_rate=5e-3)
    config.quantization.gptq_batches = 0
    if argument == "tiny":
        config.model.update(layers=3, width=48, heads=4, kv_heads=4, mlp_width=192, unroll=3)
        config.data.update(tokenizer="bytes", vocab_size=0)
        config.train.update(steps=800)
        config.optimizer.update(warmup_steps=20)
        config.evaluation.update(every_steps=200)
    return config
