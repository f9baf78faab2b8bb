"""125m

The argument is `v5e`, `v5p` or `h100`.
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
    config.train.update(steps=4200, batch_size=256)
    config.optimizer.peak_learning_rate = 0.0006
    return config
