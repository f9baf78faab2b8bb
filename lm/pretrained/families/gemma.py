"""Gemma 2 and the text models of Gemma 3."""

from lm.errors import InputError
from lm.pretrained.families import common
from lm.pretrained.family import Family
from lm.pretrained.settings import Settings

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_norm_after",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_norm_after",
}


def _read(s, default):
    # Older files name it hidden_act and mean this form, too.
    s.only("hidden_activation", "gelu_pytorch_tanh")
    s.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    s.only("attention_bias", False)
    s.only("use_bidirectional_attention", False)
    scalar = s.get("query_pre_attn_scalar", float, 256.0)
    if scalar <= 0:
        raise InputError(f"{s.where}: query_pre_attn_scalar={scalar} must be above 0")
    keys = common.read_sizes(s)
    pattern = common.read_pattern(s, keys["layers"], default)
    return keys | {
        "head_width": s.get("head_dim", int, 256),
        "activation": "geglu",
        "norm_epsilon": s.get("rms_norm_eps", float, 1e-6),
        "norm_offset": 1.0,
        "norm_placement": "both",
        "embedding_scale": 0.0,
        "attention_scale": scalar**-0.5,
        "attention_softcap": s.get("attn_logit_softcapping", float, 0.0),
        "logit_softcap": s.get("final_logit_softcapping", float, 0.0),
        "tied_head": s.get("tie_word_embeddings", bool, True),
        "layer_pattern": pattern,
        "window": s.get("sliding_window", int, 4096) if "L" in pattern else 0,
    }


def _write(c):
    scale = c.attention_scale or c.head_width**-0.5
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        **common.write_sizes(c),
        "rms_norm_eps": c.norm_epsilon,
        "query_pre_attn_scalar": _inverse_square(scale),
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
        "tie_word_embeddings": c.tied_head,
        "sliding_window": c.window or None,
        "layer_types": common.layer_types(c),
        "attention_bias": False,
    }


def _inverse_square(scale):
    """The integer n of which `scale` is n^-0.5, or else a float near it."""
    whole = round(scale**-2)
    return whole if whole**-0.5 == scale else scale**-2


def _read_gemma2(s):
    return _read(s, "LG") | common.read_rope(s)


def _write_gemma2(c):
    return _write(c) | common.write_rope(c)


def _read_gemma3(s):
    s.ignore("_sliding_window_pattern")
    every = s.get("sliding_window_pattern", int, s.get("_sliding_window_pattern", int, 6))
    if every < 1:
        raise InputError(f"{s.where}: sliding_window_pattern={every} must be at least 1")
    keys = _read(s, "L" * (every - 1) + "G")
    both = s.get("rope_parameters", dict) or {}
    if "full_attention" in both:
        where = f"{s.where}: rope_parameters"
        unknown = both.keys() - {"full_attention", "sliding_attention"}
        if unknown or not all(isinstance(part, dict) for part in both.values()):
            raise InputError(f"{where}: valid: full_attention and sliding_attention")
        rope = common.scaling_keys(Settings(both["full_attention"], where))
        local = common.scaling_keys(Settings(both["sliding_attention"], where))
        if local.get("rope_scaling", "none") != "none":
            raise InputError(f"{where}: sliding_attention must have rope_type default")
        base = local["rope_base"]
        s.ignore("rope_theta", "rope_scaling", "rope_local_base_freq")
    else:
        rope = common.read_rope(s, 1_000_000.0)
        base = s.get("rope_local_base_freq", float, 10_000.0)
    return (
        keys
        | rope
        | {"qk_norm": True, "local_rope_base": base if "L" in keys["layer_pattern"] else 0.0}
    )


def _write_gemma3(c):
    rope = common.write_rope(c)
    local = c.local_rope_base or c.rope_base
    return _write(c) | {
        "rope_theta": c.rope_base,
        "rope_scaling": rope["rope_scaling"],
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": rope["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "use_bidirectional_attention": False,
    }


def _tensors(c):
    return common.layer_tensors(c, _NORMS) + common.outer_tensors(c)


GEMMA2 = Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2, _tensors)
GEMMA3 = Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _tensors)
