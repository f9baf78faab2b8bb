"""The adapters of a model as a folder that the `peft` library reads (LoRA)."""

from typing import Any

import numpy as np

from lm.errors import InputError
from lm.model.adapters import IN, OUT, is_adapted, merged_config
from lm.model.config import ModelConfig
from lm.model.parameters import LAYERS, parameter_kind
from lm.pretrained.families import FAMILIES
from lm.pretrained.family import find
from lm.pretrained.huggingface import Entry

_WEIGHT = ".weight"


def adapter_settings(config: ModelConfig, family: str, base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
      config: of the model, with adapters.
      family: its model_type, "" for any that fits.
      base: name or folder of the model below the adapters.

    Raises:
      InputError: there are no adapters, or in places where the family has none of its own.
    """
    names = {tensor.theirs for tensor in _adapted(config, _family(config, family))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.adapter_rank,
        "lora_alpha": config.adapter_alpha,
        "lora_dropout": config.adapter_dropout,
        "target_modules": sorted({name.removesuffix(_WEIGHT).split(".")[-1] for name in names}),
        "bias": "none",
        # GPT-2 keeps its weights as [in, out].
        "fan_in_fan_out": _family(config, family) == "gpt2",
        "inference_mode": True,
    }


def adapter_entries(config: ModelConfig, family: str, params: Any, dtype: str) -> list[Entry]:
    """The tensors of adapter_model.safetensors: A as [r, in] and B as [out, r]."""
    layers, entries = params[LAYERS], []
    for tensor in _adapted(config, _family(config, family)):
        part, name = tensor.ours[0].removeprefix(f"{LAYERS}/").split("/")
        for end, theirs in ((IN, "lora_A"), (OUT, "lora_B")):
            stacked = layers[part][f"{name}{end}"]
            for layer in range(config.layers):
                module = tensor.theirs.format(layer).removesuffix(_WEIGHT)
                entries.append(
                    Entry(
                        f"base_model.model.{module}.{theirs}.weight",
                        stacked.shape[:0:-1],
                        dtype,
                        [lambda stacked=stacked, layer=layer: stacked[layer]],
                        _transposed,
                    )
                )
    return entries


def _transposed(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0].T


def _family(config: ModelConfig, family: str) -> str:
    return find(FAMILIES, merged_config(config), family)


def _adapted(config: ModelConfig, family: str) -> list[Any]:
    if not config.adapter_rank:
        raise InputError("--format=peft: this model has no adapters; valid: huggingface")
    found = []
    for tensor in FAMILIES[family].tensors(config):
        here = [path for path in tensor.ours if is_adapted(config, path)]
        if not here or parameter_kind(here[0]) != "matrix":
            continue
        if len(tensor.ours) > 1:
            raise InputError(
                f"--format=peft: {family} keeps {', '.join(tensor.ours)} in one matrix, and their "
                "adapters are apart; valid: --format=huggingface, which merges them"
            )
        found.append(tensor)
    return found
