"""Qwen2 and Qwen2.5 (biases of queries, keys and values), Qwen3 (norms of queries and keys)."""

from lm.pretrained.families import common
from lm.pretrained.family import Family


def _read(s):
    s.only("hidden_act", "silu")
    windows = s.get("use_sliding_window", bool, False)
    keys = common.read_sizes(s) | common.read_rope(s)
    layers = keys["layers"]
    first = s.get("max_window_layers", int, 28)
    default = "".join("GL"[windows and i >= first] for i in range(layers))
    pattern = common.read_pattern(s, layers, common.shortest(default))
    s.ignore("sliding_window")
    return keys | {
        "activation": "swiglu",
        "norm_epsilon": s.get("rms_norm_eps", float, 1e-6),
        "tied_head": s.get("tie_word_embeddings", bool, False),
        "layer_pattern": pattern,
        "window": s.get("sliding_window", int, 4096) if "L" in pattern else 0,
    }


def _write(c):
    windows = "L" in c.layer_pattern
    return {
        "hidden_act": "silu",
        **common.write_sizes(c),
        **common.write_rope(c),
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_head,
        "use_sliding_window": windows,
        "sliding_window": c.window if windows else None,
        "layer_types": common.layer_types(c),
    }


def _read_qwen2(s):
    s.only("use_mrope", False)
    return _read(s) | {"attention_bias": "qkv"}


def _write_qwen2(c):
    settings = _write(c)
    # Readers of this family take width / heads.
    if c.head_width * c.heads == c.width:
        del settings["head_dim"]
    return settings


def _read_qwen3(s):
    bias = "all" if s.get("attention_bias", bool, False) else "none"
    # Unlike in the other families, not width / heads.
    width = s.get("head_dim", int, 128)
    return _read(s) | {"qk_norm": True, "attention_bias": bias, "head_width": width}


def _write_qwen3(c):
    return _write(c) | {"attention_bias": c.attention_bias == "all"}


def _tensors(c):
    return common.layer_tensors(c, common.BEFORE) + common.outer_tensors(c)


QWEN2 = Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2, _tensors)
QWEN3 = Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3, _tensors)
