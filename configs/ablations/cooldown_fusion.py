"""Does the decay of the learning rate belong into the quantized phase? (arXiv 2509.22935)

Command: python -m launch.ablate --config=configs/ablations/cooldown_fusion.py:BITS --workdir=DIR
Cost:    15 runs of 20 seconds on one CPU core; those with fusion begin at a checkpoint of `full`.

BITS is 4 by default. The paper finds that fusion helps at 4 and 6 bits and does not at 1 and 2.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config(argument: str = "4") -> ConfigDict:
    """Returns the ablation at a width in bits."""
    config = small.get_config("tiny")
    shares = {"quantization.fraction": ["0.4", "0.6"]}
    bits = {"quantization.bits": float(argument)}
    fused = bits | {"quantization.from": "{full}"}
    variants = {f"fused,{name}": keys for name, keys in ablation.grid(shares, fused).items()}
    apart = bits | {"quantization.fused_cooldown": False}
    variants |= {f"apart,{name}": keys for name, keys in ablation.grid(shares, apart).items()}
    return ablation.make(
        config, variants, seeds=(0, 1, 2), baseline="apart,fraction=0.4", shared={"full": {}}
    )
