"""Does a student learn more of a trained teacher than of the text alone, at equal tokens?

Command: python -m launch.ablate --config=configs/ablations/distillation.py --workdir=DIR
Cost:    9 runs.

A student of 4 layers and 64 channels reads 0.4 million tokens of configs/quickstart.py's text: with
cross-entropy, or with the forward divergence from a teacher alone, which sees no label of the text.
The teacher has 128 channels, is trained first on the same text, and reads twice as many tokens. The
table matches the tokens of the students and does not count the teacher's. Results are in
docs/distillation.md.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config() -> ConfigDict:
    """Returns the ablation."""
    config = small.get_config()
    config.model.update(layers=4, width=64, mlp_width=256)
    config.data.sequence_length = 128
    config.train.update(steps=200, batch_size=16)
    config.evaluation.update(every_steps=0)
    variants = {
        "text": {},
        "distilled": {
            "objective.loss": "distillation",
            "objective.references.teacher": "{teacher}",
        },
    }
    return ablation.make(
        config,
        variants,
        seeds=(0, 1, 2),
        baseline="text",
        shared={"teacher": {"model.width": 128, "model.mlp_width": 512, "train.steps": 400}},
    )
