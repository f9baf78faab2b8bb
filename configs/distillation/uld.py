"""A student with half of its teacher's tokens learns its sorted probabilities.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
         python -m launch.score --model=runs/quickstart --name=teacher_sorted --largest=16
         --config=configs/distillation/uld.py --output=runs/sorted
Command: python -m launch.train --config=configs/distillation/uld.py --workdir=runs/uld
Against: the same with --config.objective.uld.coefficient=0, which is cross-entropy
Cost:    more than the quickstart's by a pass over the vocabulary, after the quickstart and one
         forward pass of it over the corpus; 64 bytes a token on disk.

Claim: the sorted probabilities of a teacher, whatever its tokens are, teach a student of another
tokenizer (universal logit distillation, arXiv 2402.12030). UNCONFIRMED: any number of the paper,
and its coefficient; the 16 largest of each are compared. Bits per byte compare the two.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.data.vocab_size = 512
    config.objective.loss = "uld"
    config.objective.references.teacher_sorted = "runs/sorted"
    return config
