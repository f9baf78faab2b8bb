"""The parameters of a model of others, on one device, with the config of a fine-tuning."""

import jax

from configs import finetune
from lm.model.config import ModelConfig
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES, make_mesh
from lm.pretrained.load import load_params
from lm.pretrained.source import open_pretrained

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def load(path, vocab_size=None):
    """Reads a folder or a .gguf file; a larger vocabulary grows its table."""
    source = open_pretrained(str(path))
    section = finetune.get_config(str(path), source).model.to_dict()
    config = ModelConfig(vocab_size=vocab_size or source.vocab_size, **section)
    return load_params(source, make_model(config, RULES), make_mesh(ONE, jax.devices()[:1]))
