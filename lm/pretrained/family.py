"""What a family of models is, and how the model section follows from a config.json and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.pretrained.settings import Settings
from lm.pretrained.tensors import Tensor

# Keys that do not change the function that a model computes.
_HOW = frozenset(
    {
        *("vocab_size", "attention", "remat", "unroll", "dtype", "param_dtype", "plain_autodiff"),
        *("accept_aliasing", "embedding_rank", "code_bits", "code_values", "code_layout"),
        *("code_scale", "code_signs", "code_seed"),
        # Adapters are no part of what a family holds; they are merged before.
        *("adapter_rank", "adapter_alpha", "adapter_dropout", "adapter_matrices"),
    }
)

# What every family has unless it says otherwise; further keys have the default of `ModelConfig`.
_PLAIN = {
    "norm": "rmsnorm",
    "embedding": "learned",
    "embedding_scale": 1.0,
    "code_head": False,
    "rope_base": 10_000.0,
    "qk_norm": False,
    "logit_softcap": 0.0,
}

# Key -> (key, value) without which it has no effect.
_ONLY_WITH = {
    "qk_norm_scope": ("qk_norm", True),
    "norm_bias": ("norm", "rmsnorm"),
    "max_positions": ("positions", "learned"),
    "rope_base": ("positions", "rotary"),
    "rope_share": ("positions", "rotary"),
    "rope_scaling": ("positions", "rotary"),
    "rope_low_frequency": ("rope_scaling", "llama3"),
    "rope_high_frequency": ("rope_scaling", "llama3"),
    "rope_original_length": ("rope_scaling", "llama3"),
}


_MOST_LAYERS = 1000


class Family(NamedTuple):
    """Models that share a `model_type`.

    Attributes:
      architecture: name of the class that other programs know.
      read: (settings) -> keys of the model section that are not plain.
      write: (config) -> settings; what a family cannot hold may be left out, see `find`.
      tensors: (config) -> every tensor of a file.
      prefix: of the names of tensors, which older files leave out.
      buffers: endings of names of tensors that hold no parameters.
    """

    architecture: str
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], list[Tensor]]
    prefix: str = "model."
    buffers: Sequence[str] = ("rotary_emb.inv_freq",)


def read_model(family: Family, values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """The keys of the model section that decide the function, and the size of the vocabulary.

    Raises:
      InputError: a key that is not understood, or a value out of range; names the file.
    """
    settings = Settings(values, where)
    if "quantization_config" in values:
        raise InputError(
            f"{where}: quantization_config: quantized weights cannot be read from this format; "
            "valid: the float model, or a .gguf file"
        )
    for key in (
        "num_hidden_layers",
        "n_layer",
    ):  # Lists are as long, before a tensor is looked for.
        if (layers := settings.get(key, int, 1)) > _MOST_LAYERS:
            raise InputError(f"{where}: {key}={layers:,} must be at most {_MOST_LAYERS:,}")
    settings = Settings(values, where)
    section = {**_defaults(), **_PLAIN, **family.read(settings)}
    vocabulary = settings.get("vocab_size", int)
    settings.check_all_read()
    return section, vocabulary


def _defaults() -> dict[str, Any]:
    fields = dataclasses.fields(ModelConfig)
    return {
        f.name: f.default
        for f in fields
        if f.default is not dataclasses.MISSING and f.name not in _HOW
    }


def find(families: Mapping[str, Family], config: ModelConfig, first: str = "") -> str:
    """The model_type of a family that holds exactly this architecture.

    That is `first` if it does; two families may compute the same function.

    Raises:
      InputError: none does; names the keys that the nearest one would have otherwise.
    """
    wanted, nearest = _function_of(config), None
    for name in sorted(families, key=lambda name: name != first):
        family = families[name]
        settings = {**family.write(config), "vocab_size": config.vocab_size}
        try:
            section, _ = read_model(family, settings, name)
            runtime = {key: getattr(config, key) for key in _HOW}
            held = _function_of(ModelConfig(**{**runtime, **section}))
        except InputError:
            continue
        differing = [key for key in wanted if wanted[key] != held.get(key)]
        differing += [key for key in held if key not in wanted]
        if not differing:
            return name
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = name, [f"model.{key}={held.get(key)}" for key in differing]
    reason = f"; {nearest[0]} would need {', '.join(nearest[1])}" if nearest else ""
    raise InputError(f"no known family of models has this architecture{reason}")


def _function_of(config: ModelConfig) -> dict[str, Any]:
    """The keys that decide what the model computes, in one form."""
    keys = {k: v for k, v in dataclasses.asdict(config).items() if k not in _HOW}
    keys["embedding_scale"] = keys["embedding_scale"] or config.width**0.5
    keys["attention_scale"] = keys["attention_scale"] or config.head_width**-0.5
    pattern = config.layer_pattern
    keys["layer_pattern"] = "".join(pattern[i % len(pattern)] for i in range(config.layers))
    if "L" not in pattern:
        keys["window"] = keys["local_rope_base"] = 0
    if config.rope_scaling == "none":
        keys["rope_factor"] = 1.0
    dropped = {k for k, (other, value) in _ONLY_WITH.items() if keys[other] != value}
    return {key: value for key, value in keys.items() if key not in dropped}
