r"""Quantization-aware training of a pretrained model, which is its own teacher.

python -m launch.train --config=configs/qat.py:SOURCE \
    --config.data.corpus=FILE.jsonl --workdir=DIR

SOURCE is a Hugging Face folder, a .gguf file or a work directory. The matrices of the layers and
their scales are trained on their grids from the first step on, scales at 12 times the learning
rate times themselves; the teacher is SOURCE in full precision. Cost and results of SmolLM2-135M are
in docs/quantization.md.
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config(source: str = "") -> ConfigDict:
    """Returns the config for the model in `source`: 4 bits in groups of 32."""
    config = finetune.get_config(source)
    config.quantization.update(bits=4.0, granularity="group", group_size=32, outer_bits=16.0)
    config.quantization.update(fraction="1", begin_with="rsq", scale_rate=12.0)
    config.objective.loss = "distillation"
    config.objective.references.teacher = source
    config.train.trainable = "layers/"
    config.train.update(steps=80, batch_size=4)
    config.optimizer.update(peak_learning_rate=2e-4, warmup_steps=5, beta2=0.98)
    config.evaluation.update(every_steps=0, batches=8, sample_tokens=0)
    return config
