"""336 million parameters, 24 layers of width 1,024: GPT-3 medium (arXiv 2005.14165, table 2.1).

Command: python -m launch.train --config=configs/scale/350m.py:v5p --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Plan:    python -m launch.plan --config=configs/scale/350m.py:v5p --topology=v5p:2x2x4
Cost:    6.7 billion tokens; docs/scale.md has the memory and an estimate of the time of a step.

The argument is `v5e`, `v5p` or `h100`.
Never trained; see configs/scale/__init__.py for what is common to all sizes, and docs/scale.md for
which of them have been compiled.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "h100": ""}
MESHES = {"v5e": {"fsdp": 4}, "v5p": {"fsdp": 4}, "h100": {"accumulation": 2}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument, MESHES, layers=24, width=1024, heads=16, kv_heads=16, mlp_width=4096
    )
    config.data.sequence_length = 2048
    config.train.update(steps=12_800, batch_size=256)
    config.optimizer.peak_learning_rate = 3e-4
    return config
