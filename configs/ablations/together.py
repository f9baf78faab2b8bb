"""Codes, quantization and weighting together: do their effects add up?

Command: python -m launch.ablate --config=configs/ablations/together.py --workdir=DIR
Cost:    27 runs of 20 seconds on one CPU core.

All eight combinations, on text of which 30% of the documents are corrupted. The quantized runs
begin with the first 60% of those that are not.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config() -> ConfigDict:
    """Returns the ablation."""
    config = small.get_config("tiny")
    config.data.corrupted = 0.3
    config.quantization.fraction = "0.4"
    variants = {}
    for name, embedding in (("table", "learned"), ("codes", "affine")):
        for width, bits in (("16", 16.0), ("4", 4.0)):
            for weighting in ("uniform", "rho1"):
                keys = {"model.embedding": embedding, "objective.weighting": weighting}
                if weighting == "rho1":
                    keys["objective.references.reference_nll"] = "{reference}"
                if bits < 16:
                    keys["quantization.bits"] = bits
                    keys["quantization.from"] = f"{{{name},16,{weighting}}}"
                variants[f"{name},{width},{weighting}"] = keys
    return ablation.make(
        config,
        variants,
        seeds=(0, 1, 2),
        baseline="table,16,uniform",
        shared={"reference": {"data.corrupted": 0.0}},
    )
