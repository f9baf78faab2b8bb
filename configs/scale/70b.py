"""70 billion parameters, 80 layers of width 8,192: as Llama 2 70B (arXiv 2307.09288).

Command: python -m launch.train --config=configs/scale/70b.py:v5p --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Plan:    python -m launch.plan --config=configs/scale/70b.py:v5p --topology=v5p:8x8x8
Cost:    1.4 trillion tokens; docs/scale.md has the memory and an estimate of the time of a step.

The argument is `v5e`, `v5p` or `h100`.
Eight key-value heads, and 131,072 entries, which are codes of 17 bits.

Never trained; see configs/scale/__init__.py for what is common to all sizes, and docs/scale.md for
which of them have been compiled.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x8", "h100": ""}
MESHES = {
    "v5e": {"fsdp": 256, "accumulation": 4},
    "v5p": {"fsdp": 64, "tensor": 8, "accumulation": 2},
    "h100": {"tensor": 8, "accumulation": 64},
}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument,
        MESHES,
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        mlp_width=28_672,
        activation="swiglu",
    )
    config.data.vocab_size = 131_072
    config.data.sequence_length = 4096
    config.train.update(steps=331_500, batch_size=1024)
    config.optimizer.peak_learning_rate = 1.5e-4
    return config
