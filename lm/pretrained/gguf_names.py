"""The settings and tensors of a GGUF file by the names of a Hugging Face folder."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.errors import InputError, shown
from lm.model.config import ModelConfig
from lm.pretrained.gguf_file import GGUFFile, llama_rows
from lm.pretrained.safetensors_file import Stored

# general.architecture -> model_type. The files of Llama, Mistral and SmolLM 1 and 2 are "llama".
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Our key of config.json -> its name after the architecture, and whether a file must have it.
_SETTINGS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}

# Keys that follow from others, or that say nothing of what is computed.
_IRRELEVANT = ("vocab_size", "rope.dimension_count", "attention.value_length")

# The scalings of Llama 3.1 (8) and 3.2 (32), which a file keeps as one factor for each frequency.
_LLAMA3_NAMES = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LLAMA3 = (1.0, 4.0, 8192)
_LLAMA3_FACTORS = (8.0, 32.0)

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def settings(file: GGUFFile, where: str) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
      InputError: an architecture or a key that is not known.
    """
    metadata = file.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{where}: general.architecture={shown(repr(name), 40)} is not one of: "
            f"{', '.join(ARCHITECTURES)}"
        )
    found: dict[str, Any] = {"model_type": ARCHITECTURES[name]}
    known = {f"{name}.{key}": ours for ours, key in _SETTINGS.items()}
    for key, value in metadata.items():
        if key in known:
            found[known[key]] = _shortest(value)
        elif key == f"{name}.rope.scaling.type" and isinstance(value, str) and value == "none":
            continue
        elif key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in _IRRELEVANT:
            raise InputError(f"{where}: {shown(key)}={shown(repr(value), 60)} is not known")
    head = _head_width(name, metadata, found, where)
    if name == "qwen3":  # Whose config.json has another default.
        found["head_dim"] = head
    if "rope_freqs.weight" in file.tensors:
        found["rope_parameters"] = _scaling(file, found, head, where)
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise InputError(f"{where}: tensors missing: token_embd.weight, of [V, D]")
    found["vocab_size"] = table.shape[0]
    found["tie_word_embeddings"] = "output.weight" not in file.tensors
    biases = "blk.0.attn_output.bias" in file.tensors
    if name == "llama" and biases:
        found["attention_bias"] = True
    if name == "llama" and "blk.0.ffn_down.bias" in file.tensors:
        found["mlp_bias"] = True
    return found


def _shortest(value: Any) -> Any:
    """Of a float32 the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_width(name: str, metadata: Mapping[str, Any], found: dict[str, Any], where: str) -> int:
    """Channels of a head, all of which must be rotated."""
    sizes = {key: found.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim")}
    names = {key: f"{name}.{_SETTINGS[key]}" for key in sizes}
    for key, value in sizes.items():
        if (key != "head_dim" or value is not None) and (type(value) is not int or value < 1):
            raise InputError(f"{where}: {names[key]}={shown(repr(value), 40)} must be 1 or more")
    head = sizes["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"]
    for key in ("rope.dimension_count", "attention.value_length"):
        size = metadata.get(f"{name}.{key}", head)
        if type(size) is not int or size != head:
            raise InputError(f"{where}: {name}.{key}={shown(repr(size), 40)} must be {head}")
    return head


def _scaling(file: GGUFFile, found: Mapping[str, Any], head: int, where: str) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a file keeps the factor of each frequency only."""
    base = found.get("rope_theta", 10_000.0)
    if type(base) not in (int, float) or not 0 < base < math.inf:
        raise InputError(f"{where}: rope.freq_base={shown(repr(base), 40)} must be above 0")
    if file.tensors["rope_freqs.weight"].shape != (head // 2,):
        raise InputError(f"{where}: rope_freqs.weight must be of shape [{head // 2}]")
    factors = np.asarray(file.tensors["rope_freqs.weight"].read(), np.float64)
    if np.all(factors == 1):
        return {"rope_theta": base, "rope_type": "default"}
    for factor in _LLAMA3_FACTORS:
        if np.allclose(factors, _llama3_factors(base, head, factor, *_LLAMA3), rtol=1e-3):
            return {"rope_theta": base, "rope_type": "llama3", "factor": factor} | dict(
                zip(_LLAMA3_NAMES, _LLAMA3, strict=True)
            )
    raise InputError(f"{where}: rope_freqs.weight is not the scaling of Llama 3.1 or 3.2")


def tensors(file: GGUFFile, found: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """The tensors by the names of Hugging Face, rows of queries and keys in its order.

    Raises:
      InputError: a name that is not known.
    """
    named = {}
    for name, tensor in file.tensors.items():
        stored = Stored(tensor.shape, tensor.type, tensor.read)
        if name == "rope_freqs.weight":
            continue
        theirs = _OUTER.get(name) or _layer_name(name)
        if theirs is None:
            raise InputError(f"{where}: tensors not known: {shown(name)}")
        heads = found["num_attention_heads"]
        if found["model_type"] == "llama" and ".attn_q." in name:
            stored = _in_order(stored, heads, where)
        elif found["model_type"] == "llama" and ".attn_k." in name:
            stored = _in_order(stored, found.get("num_key_value_heads", heads), where)
        named[theirs] = stored
    return named


def _layer_name(name: str) -> str | None:
    """blk.N.attn_q.weight -> model.layers.N.self_attn.q_proj.weight."""
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdigit() or parts[2] not in LAYER:
        return None
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"


def _in_order(stored: Stored, heads: int, where: str) -> Stored:
    if not isinstance(heads, int) or heads < 1 or stored.shape[0] % (2 * heads):
        raise InputError(f"{where}: {stored.shape[0]:,} rows of queries or keys for {heads} heads")
    return stored._replace(read=lambda: llama_rows(stored.read(), heads))


def gguf_name(theirs: str) -> str:
    """model.layers.N.self_attn.q_proj.weight -> blk.N.attn_q.weight."""
    outer = {theirs: name for name, theirs in _OUTER.items()}
    if theirs in outer:
        return outer[theirs]
    _, _, layer, *middle, end = theirs.split(".")
    of_layer = {theirs: name for name, theirs in LAYER.items()}
    return f"blk.{layer}.{of_layer['.'.join(middle)]}.{end}"


def is_known_scaling(c: ModelConfig) -> bool:
    """Whether `_scaling` finds the settings of a llama3 scaling from its factors again."""
    settings = (c.rope_low_frequency, c.rope_high_frequency, c.rope_original_length)
    return settings == _LLAMA3 and c.rope_factor in _LLAMA3_FACTORS


def rope_factors(c: ModelConfig) -> np.ndarray:
    """What each rotary frequency is divided by in the scaling of Llama 3.1, float32 [H / 2]."""
    settings = (c.rope_low_frequency, c.rope_high_frequency, c.rope_original_length)
    factors = _llama3_factors(c.rope_base, c.rotary_width, c.rope_factor, *settings)
    return factors.astype(np.float32)


def _llama3_factors(
    base: float, width: int, factor: float, low: float, high: float, length: int
) -> np.ndarray:
    half = width // 2
    turns = length / (2 * np.pi * base ** (np.arange(half) / half))
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)
