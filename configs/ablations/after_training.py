"""Quantization in training against quantization after it: round to nearest, and GPTQ.

Command: python -m launch.ablate --config=configs/ablations/after_training.py:BITS --workdir=DIR
Cost:    6 trainings of 40 seconds on one CPU core, and 12 quantizations of 15.

BITS is 4 by default. `full` is the run in full precision that all others begin with: `qat` has its
first 60%, the others are its end, quantized by launch.quantize.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config(argument: str = "4") -> ConfigDict:
    """Returns the ablation at a width in bits."""
    bits = float(argument)
    qat = {"quantization.bits": bits, "quantization.fraction": "0.4", "quantization.from": "{full}"}
    after = ablation.grid(
        {"quantize.method": ["rtn", "gptq"], "quantize.quantizer": ["absmax", "paretoq"]},
        {"quantize.run": "{full}", "quantize.bits": bits},
    )
    return ablation.make(
        small.get_config(),
        ablation.chain({"full": {}, "qat": qat}, after),
        seeds=(0, 1, 2),
        baseline="method=rtn,quantizer=absmax",
    )
