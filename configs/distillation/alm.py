"""A student with half of its teacher's tokens learns the likelihood of pieces of text.

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
         python -m launch.score --model=runs/quickstart --name=chunk_log_probability
         --config=configs/distillation/alm.py --output=runs/chunks
Command: python -m launch.train --config=configs/distillation/alm.py --workdir=runs/alm
Against: python -m launch.train --config=configs/distillation/alm.py --workdir=runs/alm_parent
         --config.objective.name=weighted
Cost:    that of the quickstart, after the quickstart and one forward pass of it over the corpus;
         4 bytes a token on disk.

Claim: a teacher with another tokenizer can be matched where both tokenizations have a common byte
boundary (approximate likelihood matching, arXiv 2503.20083). UNCONFIRMED: any number of the paper.
Its students are pretrained and change their tokenizer. This one begins untrained, so the loss of
the text is added with a coefficient of 1, which is ours. Bits per byte compare the two.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.data.vocab_size = 512
    config.objective.name = "alm"
    config.objective.alm.cross_entropy = 1.0
    config.objective.references.chunk_log_probability = "runs/chunks"
    return config
