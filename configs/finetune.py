r"""Trains a model that others have trained, or that a run has left, on one's own text.

python -m launch.train --config=configs/finetune.py:SOURCE \
    --config.data.corpus=FILE.jsonl --workdir=DIR

SOURCE is a Hugging Face folder, a .gguf file or a work directory. It decides the model section and
the tokenizer; the rates are those of a full fine-tuning, change them as you would in any config.
"""

from ml_collections import ConfigDict

from configs import base
from lm.errors import InputError, shown
from lm.pretrained.source import Pretrained
from lm.pretrained.start import describe, of_files


def get_config(source: str = "", opened: Pretrained | None = None) -> ConfigDict:
    """Returns the config of a fine-tuning of the model in `source`, which may be open already."""
    found = of_files(opened) if opened else describe(source)
    config = base.get_config()
    try:
        config.model.update(found.section)
        config.model.remat = "dots"  # less memory, and on CPU no slower
        config.data.update(
            tokenizer=found.tokenizer,
            end_of_text=found.end_of_text,
            beginning_of_text=found.beginning_of_text,
            vocab_size=found.vocab_size,
            packing="best_fit",
            sequence_length=min(512, config.model.max_positions),
        )
        config.initialise.update({"from": source, "family": found.family})
    except (KeyError, TypeError) as error:  # config.json of a run that is damaged, or too new.
        raise InputError(f"{source}: {shown(str(error.args[0]), 200)}") from None
    config.train.update(steps=200, batch_size=8)
    config.optimizer.update(peak_learning_rate=2e-5, warmup_steps=10, beta2=0.999, weight_decay=0.0)
    config.evaluation.update(every_steps=50, sample_prompt="The ")
    return config
