"""7b

The argument is `v5e`, `v5p` or `h100`.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x8", "h100": ""}
MESHES = {"v5e": {"accumulation": 2}, "v5p": {}, "h100": {"accumulation": 32}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument,
        MESHES,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        mlp_width=11008,
        activation="swiglu",
    )
    config.data.sequence_length = 4096
    config.train.update(steps=31500, batch_size=1024)
    config.optimizer.peak_learning_rate = 0.0003
    return config
