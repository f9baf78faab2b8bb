"""110 million parameters, 12 layers of width 768: GPT-3 small (arXiv 2005.14165, table 2.1).

Command: python -m launch.train --config=configs/scale/125m.py:v5p --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Plan:    python -m launch.plan --config=configs/scale/125m.py:v5p --topology=v5p:2x2x2
Cost:    2.2 billion tokens; docs/scale.md has the memory and an estimate of the time of a step.

The argument is `v5e`, `v5p` or `h100`.
GPT-3's own has 125 million with its table of 50,257 entries; here 25 million of 110 are the head.

Never trained; see configs/scale/__init__.py for what is common to all sizes, and docs/scale.md for
which of them have been compiled.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "h100": ""}
MESHES = {"v5e": {}, "v5p": {}, "h100": {}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument, MESHES, layers=12, width=768, heads=12, kv_heads=12, mlp_width=3072
    )
    config.data.sequence_length = 2048
    config.train.update(steps=4_200, batch_size=256)
    config.optimizer.peak_learning_rate = 6e-4
    return config
