"""Do weighted tokens beat cross-entropy on clean text, and on text of which a share is corrupted?

Command: python -m launch.ablate --config=configs/ablations/weighting.py:SHARE --workdir=DIR
Cost:    21 runs of up to a minute on one CPU core.

SHARE, 0 by default, is that of training documents with their words in random order; validation is
of clean text. The weightings that compare with a model (Rho-1, arXiv 2404.07965, and ssToken, arXiv
2510.18250) have a `reference` of the same size, trained as long on the clean text: the table
matches tokens and does not count that run. ssToken is without its attention (gamma = 1), for there
is no prompt.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config(argument: str = "0") -> ConfigDict:
    """Returns the ablation at a share of corrupted documents."""
    config = small.get_config()
    config.data.corrupted = float(argument)
    references = {"rho1": "reference_nll", "ss_token": "history_nll"}
    variants = {"cross_entropy": {}}
    for name in ("rho1", "ss_token", "dynamic", "dft", "focal"):
        variants[name] = {"objective.weighting": name}
        if name in references:
            variants[name][f"objective.references.{references[name]}"] = "{reference}"
    variants["ss_token"]["objective.ss_token.gamma"] = 1.0
    return ablation.make(
        config,
        variants,
        seeds=(0, 1, 2),
        baseline="cross_entropy",
        shared={"reference": {"data.corrupted": 0.0}},
    )
