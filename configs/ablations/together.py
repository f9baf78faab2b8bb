"""Codes, quantization and weighting together: do their effects add up?

Command: python -m launch.ablate --config=configs/ablations/together.py --workdir=DIR
Cost:    27 runs of 1 to 3 minutes on 2 CPU cores.

All eight combinations, on text of which 30% of the documents are corrupted.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config() -> ConfigDict:
    """Returns the ablation."""
    config = small.get_config()
    config.data.corrupted = 0.3
    config.quantization.fraction = "0.4"
    config.objective.references.reference_nll = "{reference}"
    variants = {}
    for name, embedding in (("table", "learned"), ("codes", "affine")):
        for width, bits in (("16", 16.0), ("4", 4.0)):
            for weighting in ("uniform", "rho1"):
                variants[f"{name},{width},{weighting}"] = {
                    "model.embedding": embedding,
                    "quantization.bits": bits,
                    "objective.weighting": weighting,
                }
    reference = {"data.corrupted": 0.0, "objective.references.reference_nll": ""}
    return ablation.make(
        config,
        variants,
        seeds=(0, 1, 2),
        baseline="table,16,uniform",
        shared={"reference": reference},
    )
