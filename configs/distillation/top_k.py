"""A smaller model learns from the 16 largest probabilities of a teacher, stored once.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
         python -m launch.score --model=runs/quickstart --name=teacher_top_k --largest=16
         --output=runs/top_k
Command: python -m launch.train --config=configs/distillation/top_k.py --workdir=runs/top_k_student
Against: the same with --config.objective.top_k_distillation.share=0, which is cross-entropy, and
         with --config.objective.top_k_distillation.rest=False
Cost:    less than the quickstart's, after the quickstart and one forward pass of it over the
         corpus; 128 bytes a token on disk, 0.5 GB.

Claim: soft labels teach a small model more than the text alone (arXiv 1503.02531), and few of them
are enough where the rest of the mass is known. The tables of the paper have not been checked here.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = student()
    config.objective.loss = "top_k_distillation"
    config.objective.references.teacher_top_k = "runs/top_k"
    return config


def student() -> ConfigDict:
    """A quarter of the quickstart's layers and half of its width."""
    config = quickstart.get_config()
    config.model.update(layers=1, width=64, heads=2, kv_heads=2, mlp_width=256)
    return config
