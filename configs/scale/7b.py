"""6.6 billion parameters, 32 layers of width 4,096: as Llama 7B (arXiv 2302.13971, table 2).

Command: python -m launch.train --config=configs/scale/7b.py:v5p --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Plan:    python -m launch.plan --config=configs/scale/7b.py:v5p --topology=v5p:8x8x8
Cost:    132 billion tokens; docs/scale.md has the memory and an estimate of the time of a step.

The argument is `v5e`, `v5p` or `h100`.
Never trained; see configs/scale/__init__.py for what is common to all sizes, and docs/scale.md for
which of them have been compiled.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x8", "h100": ""}
MESHES = {
    "v5e": {"fsdp": 16, "accumulation": 4},
    "v5p": {"fsdp": 64},
    "h100": {"fsdp": 8, "accumulation": 32},
}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument,
        MESHES,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        mlp_width=11_008,
        activation="swiglu",
    )
    config.data.sequence_length = 4096
    config.train.update(steps=31_500, batch_size=1024)
    config.optimizer.peak_learning_rate = 3e-4
    return config
