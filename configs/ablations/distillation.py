"""Does a student learn more of a trained teacher than of the text alone, at equal tokens?

Before:  python -m launch.train --config=configs/small.py --workdir=runs/teacher
         --config.model.layers=4 --config.model.width=128 --config.model.mlp_width=512
         --config.data.sequence_length=128 --config.train.batch_size=16 --config.train.steps=400
         --config.evaluation.every_steps=0
Command: python -m launch.ablate --config=configs/ablations/distillation.py:runs/teacher
         --workdir=DIR
Cost:    6 runs of 0.4 million tokens, after the teacher's 0.8 million.

A student of 4 layers and 64 channels reads configs/quickstart.py's text: with cross-entropy, or
with the forward divergence from a teacher alone, which sees no label of the text. The teacher has
128 channels and reads twice as many tokens of the same text; it is one for all seeds. The table
matches the tokens of the students and does not count the teacher's. Results are in
docs/distillation.md.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config(teacher: str = "runs/teacher") -> ConfigDict:
    """Returns the ablation for a teacher: a work directory."""
    config = small.get_config()
    config.model.update(layers=4, width=64, mlp_width=256)
    config.data.sequence_length = 128
    config.train.update(steps=200, batch_size=16)
    config.evaluation.update(every_steps=0)
    distilled = {"objective.loss": "distillation", "objective.references.teacher": teacher}
    variants = {"text": {}, "distilled": distilled}
    return ablation.make(config, variants, seeds=(0, 1, 2), baseline="text")
