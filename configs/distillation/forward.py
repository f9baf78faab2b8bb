"""A small student learns the whole distribution of a trained teacher (arXiv 1503.02531).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/forward.py:runs/quickstart
         --workdir=runs/distilled
Against: the same with --config.objective.loss=cross_entropy
Cost:    a student of 0.3 million parameters and 2.5 million tokens; the teacher's forward pass,
         with 1 million, comes on top.

Claim: soft labels of a teacher say more of every token than the text does, so that a student gets
further on as many tokens. The paper's numbers, of other tasks, have not been checked here;
docs/distillation.md has ours. The student has 4 layers of half the teacher's width. The teacher
behind the colon is a work directory, a Hugging Face folder or a .gguf file with the tokenizer of
the student; with one from outside, set data.tokenizer to its tokenizer.json.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = quickstart.get_config()
    config.model.update(width=64, mlp_width=256)
    config.objective.loss = "distillation"
    config.objective.references.teacher = teacher
    return config
