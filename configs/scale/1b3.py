"""1.3 billion parameters, 24 layers of width 2,048: GPT-3 XL (arXiv 2005.14165, table 2.1).

Command: python -m launch.train --config=configs/scale/1b3.py:v5p --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Plan:    python -m launch.plan --config=configs/scale/1b3.py:v5p --topology=v5p:4x4x4
Cost:    25.5 billion tokens; docs/scale.md has the memory and an estimate of the time of a step.

The argument is `v5e`, `v5p` or `h100`.
With 16 heads of 128: the table's 24 heads of 128 do not make its width.

Never trained; see configs/scale/__init__.py for what is common to all sizes, and docs/scale.md for
which of them have been compiled.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:8x8", "v5p": "v5p:4x4x4", "h100": ""}
MESHES = {"v5e": {"fsdp": 8}, "v5p": {"fsdp": 16}, "h100": {"fsdp": 8, "accumulation": 4}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument, MESHES, layers=24, width=2048, heads=16, kv_heads=16, mlp_width=8192
    )
    config.data.sequence_length = 2048
    config.train.update(steps=24_320, batch_size=512)
    config.optimizer.peak_learning_rate = 2e-4
    return config
