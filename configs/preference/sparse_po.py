"""SparsePO (arXiv 2410.05102): masks say where reward and divergence count.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/sparse_po.py --workdir=runs/sparse_po
         python -m launch.evaluate --model=runs/sparse_po --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: not all tokens carry a preference: masks on rewards and divergences of tokens, here those of
the reference's activations (MaPO), let the policy move where it matters. The paper's tables have
not been checked here.

The learned masks of the paper are not here. With objective.sparse_po.mask=ones the loss is that of
TDPO (arXiv 2404.11999) with alpha 1. Watch `reference_kl`.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    config = dpo.start("sparse_po")
    config.objective.references.teacher = "runs/noisy"
    config.objective.sparse_po.mask = "activations"
    return config
