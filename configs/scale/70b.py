"""70b

The argument is `v5e`, `v5p` or `h100`.
"""

from ml_collections import ConfigDict

from configs import scale

TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:8x8x8", "h100": ""}
MESHES = {"v5e": {"accumulation": 4}, "v5p": {}, "h100": {"accumulation": 64, "tensor": 8}}


def get_config(argument: str = "v5p") -> ConfigDict:
    """Returns the config for one of the three kinds of hardware."""
    config = scale.make(
        argument,
        MESHES,
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        mlp_width=28672,
        activation="swiglu",
    )
    config.data.vocab_size = 131_072
    config.data.sequence_length = 4096
    config.train.update(steps=330000, batch_size=1024)
    config.optimizer.peak_learning_rate = 0.00015
    return config
