"""Does a model need a trained input table? (arXiv 2605.09751)

Command: python -m launch.ablate --config=configs/ablations/codes.py --workdir=runs/ablations/codes
Cost:    21 runs of 40 seconds on one CPU core.

The controls: random codes of the same length say whether the bits of the id matter, frozen normal
vectors whether codes do, bits through a trained matrix whether the fixed lift does, and a table of
low rank whether the number of trained parameters does.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config() -> ConfigDict:
    """Returns the ablation."""
    names = ("learned", "binary", "affine", "random_codes", "gaussian", "projected")
    variants = {name: {"model.embedding": name} for name in names}
    low_rank = {"model.embedding": "learned_low_rank", "model.embedding_rank": 10}
    return ablation.make(
        small.get_config(),
        ablation.chain(variants, {"learned_low_rank": low_rank}),
        seeds=(0, 1, 2),
        baseline="learned",
    )
