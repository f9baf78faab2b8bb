"""The shapes that launch.benchmark times; the argument is one of `SHAPES`.

Command: python -m launch.benchmark --shapes=tiny,small
Cost:    tiny and small, with either vocabulary, fit a CPU; 350m, 350m_131k and 1.3b want an
         accelerator with 80 GB and were not run on one.

Batches are random tokens, so data.vocab_size may be any; launch.train takes the same sizes with a
tokenizer of so many entries.
"""

from ml_collections import ConfigDict

from configs import base

# layers, width, heads, vocabulary, sequence length, batch size, micro-batches it is split into. Two
# micro-batches fit the caches better: 0.88 x the time at tiny, 0.96 at tiny_50k; at width 384 they
# save no time, but small_50k stays below 2 GB with them.
SHAPES = {
    "tiny": (4, 128, 4, 256, 256, 16, 2),
    "small": (6, 384, 6, 256, 256, 8, 1),
    "tiny_50k": (4, 128, 4, 50_304, 256, 16, 2),
    "small_50k": (6, 384, 6, 50_304, 256, 8, 2),
    "350m": (24, 1024, 16, 50_304, 2048, 16, 1),
    "350m_131k": (24, 1024, 16, 131_072, 2048, 4, 1),
    "1.3b": (24, 2048, 16, 50_304, 2048, 8, 1),
}


def get_config(shape: str = "tiny") -> ConfigDict:
    """Returns the config of a shape.

    Raises:
      LookupError: another argument.
    """
    if shape not in SHAPES:
        # ml_collections would show a ValueError with its traceback.
        raise LookupError(f"argument {shape!r} is not one of: {', '.join(SHAPES)}")
    config = base.get_config()
    layers, width, heads, vocabulary, length, rows, accumulation = SHAPES[shape]
    config.model.update(layers=layers, width=width, heads=heads, kv_heads=heads)
    config.model.update(mlp_width=4 * width)
    config.data.update(vocab_size=vocabulary, sequence_length=length)
    config.train.update(batch_size=rows, accumulation=accumulation)
    config.evaluation.update(every_steps=0)
    config.checkpoint.update(every_steps=0)
    if layers == 24:  # for accelerators
        config.model.update(embedding="binary", dtype="bfloat16", remat="dots")
    return config
