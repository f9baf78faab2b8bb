"""1.3b

The argument is `v5e`, `v5p` or `h100`.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:8x8", "v5p": "v5p:4x4x4", "h100": ""}
MESHES = {"v5e": {}, "v5p": {}, "h100": {"accumulation": 4}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument, MESHES, layers=24, width=2048, heads=16, kv_heads=16, mlp_width=8192
    )
    config.data.sequence_length = 2048
    config.train.update(steps=24400, batch_size=512)
    config.optimizer.peak_learning_rate = 0.0002
    return config
