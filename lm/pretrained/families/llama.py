"""Llama 2 and 3, SmolLM 1 to 3, Mistral."""

from lm.errors import InputError
from lm.pretrained.families import common
from lm.pretrained.family import Family


def _read(s):
    s.only("hidden_act", "silu")
    s.only("pretraining_tp", 1)
    s.only("rope_interleaved", False)
    keys = common.read_sizes(s) | common.read_rope(s)
    return keys | {
        "activation": "swiglu",
        "norm_epsilon": s.get("rms_norm_eps", float, 1e-6),
        "attention_bias": "all" if s.get("attention_bias", bool, False) else "none",
        "mlp_bias": s.get("mlp_bias", bool, False),
        "tied_head": s.get("tie_word_embeddings", bool, False),
    }


def _write(c):
    return {
        "hidden_act": "silu",
        **common.write_sizes(c),
        **common.write_rope(c),
        "rms_norm_eps": c.norm_epsilon,
        "attention_bias": c.attention_bias == "all",
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied_head,
    }


def _tensors(c):
    return common.layer_tensors(c, common.BEFORE) + common.outer_tensors(c)


def _read_mistral(s):
    keys = _read(s)
    if s.has("sliding_window"):
        keys |= {"layer_pattern": "L", "window": s.get("sliding_window", int)}
    pattern = common.read_pattern(s, keys["layers"], keys.get("layer_pattern", "G"))
    return keys | {"layer_pattern": pattern}


def _write_mistral(c):
    return _write(c) | {"sliding_window": c.window if c.layer_pattern == "L" else None}


def _read_smollm3(s):
    s.only("use_sliding_window", False)
    s.ignore("sliding_window", "max_window_layers", "no_rope_layer_interval")
    keys = _read(s)
    if common.read_pattern(s, keys["layers"]) != "G":
        raise InputError(f"{s.where}: layer_types of SmolLM3 must all be full_attention")
    interval = s.get("no_rope_layer_interval", int, 4)
    if not interval:
        raise InputError(f"{s.where}: no_rope_layer_interval=0 must be at least 1")
    default = [int((i + 1) % interval != 0) for i in range(keys["layers"])]
    rotary = s.get("no_rope_layers", list, default)
    if len(rotary) != keys["layers"]:
        raise InputError(f"{s.where}: no_rope_layers must have one number for each layer")
    pattern = "".join("G" if one else "N" for one in rotary)
    return keys | {"layer_pattern": common.shortest(pattern)}


def _write_smollm3(c):
    letters = [c.layer_pattern[i % len(c.layer_pattern)] for i in range(c.layers)]
    return _write(c) | {
        "no_rope_layers": [int(letter != "N") for letter in letters],
        "layer_types": common.layer_types(c),
        "use_sliding_window": False,
        "sliding_window": None,
    }


LLAMA = Family("LlamaForCausalLM", _read, _write, _tensors)
MISTRAL = Family("MistralForCausalLM", _read_mistral, _write_mistral, _tensors)
SMOLLM3 = Family("SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, _tensors)
