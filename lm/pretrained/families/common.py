"""What most families share: names of settings and of tensors since Llama."""

from typing import Any

from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.pretrained.settings import Settings
from lm.pretrained.tensors import Tensor, same, transposed

ATTENTION = ("query", "key", "value", "output")


def read_sizes(s: Settings) -> dict[str, Any]:
    """Layers, widths and heads."""
    heads = s.get("num_attention_heads", int)
    return {
        "layers": s.get("num_hidden_layers", int),
        "width": s.get("hidden_size", int),
        "heads": heads,
        "kv_heads": s.get("num_key_value_heads", int, heads),
        "mlp_width": s.get("intermediate_size", int),
        "head_width": s.get("head_dim", int, 0),
        "max_positions": s.get("max_position_embeddings", int, 2048),
    }


def write_sizes(c: ModelConfig) -> dict[str, Any]:
    """See `read_sizes`."""
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.mlp_width,
        "head_dim": c.head_width,
        "max_position_embeddings": c.max_positions,
    }


def read_rope(s: Settings, base: float = 10_000.0, *, part: bool = False) -> dict[str, Any]:
    """Base, share and scaling of the rotary positions, in the form of any transformers version.

    `part` is for families that may rotate a part of each head.

    Raises:
      InputError: a kind of scaling that is not known.
    """
    found = {"rope_theta": s.get("rope_theta", float, base)}
    found |= s.get("rope_scaling", dict) or {}
    found |= s.get("rope_parameters", dict) or {}
    keys = scaling_keys(Settings(found, f"{s.where}: rope_parameters"))
    if share := s.get("partial_rotary_factor", float, 0.0):
        keys["rope_share"] = share
    if not part and keys.get("rope_share", 1.0) != 1.0:
        raise InputError(f"{s.where}: partial_rotary_factor={keys['rope_share']} must be 1.0")
    return keys


def scaling_keys(rope: Settings) -> dict[str, Any]:
    """Keys of the model section from one rope_parameters."""
    old = rope.only("type", "default", "none", "linear", "llama3")
    kind = rope.only("rope_type", old, "default", "linear", "llama3")
    keys = {"rope_base": rope.get("rope_theta", float)}
    if share := rope.get("partial_rotary_factor", float, 0.0):
        keys["rope_share"] = share
    if kind in ("linear", "llama3"):
        keys |= {"rope_scaling": kind, "rope_factor": rope.get("factor", float)}
    if kind == "llama3":
        keys |= {
            "rope_low_frequency": rope.get("low_freq_factor", float),
            "rope_high_frequency": rope.get("high_freq_factor", float),
            "rope_original_length": rope.get("original_max_position_embeddings", int),
        }
    rope.ignore("factor", "original_max_position_embeddings")
    rope.check_all_read()
    return keys


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """See `read_rope`: both the older keys and those of transformers 5."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if c.rope_scaling != "none":
        scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": c.rope_low_frequency,
            "high_freq_factor": c.rope_high_frequency,
            "original_max_position_embeddings": c.rope_original_length,
        }
    share = {} if c.rope_share == 1 else {"partial_rotary_factor": c.rope_share}
    return {
        "rope_theta": c.rope_base,
        "rope_scaling": None if c.rope_scaling == "none" else scaling,
        "rope_parameters": {"rope_theta": c.rope_base, **scaling, **share},
        **share,
    }


def read_pattern(s: Settings, layers: int, default: str = "G") -> str:
    """`model.layer_pattern` from layer_types; `default` where the file has none."""
    kinds = s.get("layer_types", list)
    if kinds is None:
        return default
    letters = {"full_attention": "G", "sliding_attention": "L"}
    if len(kinds) != layers or set(map(str, kinds)) - set(letters):
        raise InputError(
            f"{s.where}: layer_types must be {layers} of: {', '.join(letters)}; it has "
            f"{len(kinds)}: {', '.join(sorted(set(map(str, kinds))))[:80]}"
        )
    return shortest("".join(letters[kind] for kind in kinds))


def shortest(pattern: str) -> str:
    """The shortest pattern that, repeated over the layers, is `pattern`."""
    for size in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % size] for i in range(len(pattern))):
            return pattern[:size]
    return pattern


def layer_types(c: ModelConfig) -> list[str]:
    """See `read_pattern`."""
    kinds = {"G": "full_attention", "L": "sliding_attention", "N": "full_attention"}
    return [kinds[c.layer_pattern[i % len(c.layer_pattern)]] for i in range(c.layers)]


def outer_tensors(c: ModelConfig, head: str = "lm_head.weight") -> list[Tensor]:
    """Table, last norm, and the head where it is a matrix of its own."""
    tensors = [
        same("model.embed_tokens.weight", "embedding/table"),
        same("model.norm.weight", "final_norm/scale"),
    ]
    return tensors if c.tied_head else [*tensors, transposed(head, "head/kernel")]


def layer_tensors(c: ModelConfig, norms: dict[str, str]) -> list[Tensor]:
    """Projections, biases and norms of a layer; `norms` maps their norm to ours."""
    at, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    tensors = []
    for ours in ATTENTION:
        theirs = f"{at}.{ours[0]}_proj"
        tensors.append(transposed(f"{theirs}.weight", f"layers/attention/{ours}"))
        if c.attention_bias == "all" or (c.attention_bias == "qkv" and ours != "output"):
            tensors.append(same(f"{theirs}.bias", f"layers/attention/{ours}_bias"))
    for ours in ("gate", "up", "down"):
        theirs = f"{mlp}.{ours}_proj"
        tensors.append(transposed(f"{theirs}.weight", f"layers/mlp/{ours}"))
        if c.mlp_bias:
            tensors.append(same(f"{theirs}.bias", f"layers/mlp/{ours}_bias"))
    if c.qk_norm:
        for ours in ("query", "key"):
            name = f"layers/attention/{ours}_norm/scale"
            tensors.append(same(f"{at}.{ours[0]}_norm.weight", name))
    for theirs, ours in norms.items():
        tensors.append(same(f"model.layers.{{}}.{theirs}.weight", f"layers/{ours}/scale"))
    return tensors


BEFORE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
