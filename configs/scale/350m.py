"""350m

The argument is `v5e`, `v5p` or `h100`.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "h100": ""}
MESHES = {"v5e": {"accumulation": 2}, "v5p": {}, "h100": {"accumulation": 2}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument, MESHES, layers=24, width=1024, heads=16, kv_heads=16, mlp_width=4096
    )
    config.data.sequence_length = 2048
    config.train.update(steps=12800, batch_size=256)
    config.optimizer.peak_learning_rate = 0.0003
    return config
