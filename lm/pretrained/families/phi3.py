"""Phi-3 and Phi-4 of text: one tensor of queries, keys and values, one of gate and up."""

from lm.pretrained.families import common
from lm.pretrained.family import Family
from lm.pretrained.tensors import same, stacked, transposed


def _read(s):
    s.only("hidden_act", "silu")
    s.only("attention_bias", False)
    keys = common.read_sizes(s) | common.read_rope(s, part=True)
    if s.has("sliding_window"):
        keys |= {"layer_pattern": "L", "window": s.get("sliding_window", int)}
    return keys | {
        "activation": "swiglu",
        "norm_epsilon": s.get("rms_norm_eps", float, 1e-5),
        "tied_head": s.get("tie_word_embeddings", bool, False),
    }


def _write(c):
    settings = {
        "hidden_act": "silu",
        **common.write_sizes(c),
        **common.write_rope(c),
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_head,
        "sliding_window": c.window if c.layer_pattern == "L" else None,
    }
    if c.head_width * c.heads == c.width:
        del settings["head_dim"]
    return settings


def _tensors(c):
    at, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    qkv = (f"layers/attention/{name}" for name in common.ATTENTION[:3])
    norms = [
        same(f"model.layers.{{}}.{theirs}.weight", f"layers/{ours}/scale")
        for theirs, ours in common.BEFORE.items()
    ]
    return [
        stacked(f"{at}.qkv_proj.weight", *qkv),
        transposed(f"{at}.o_proj.weight", "layers/attention/output"),
        stacked(f"{mlp}.gate_up_proj.weight", "layers/mlp/gate", "layers/mlp/up"),
        transposed(f"{mlp}.down_proj.weight", "layers/mlp/down"),
        *norms,
        *common.outer_tensors(c),
    ]


PHI3 = Family("Phi3ForCausalLM", _read, _write, _tensors)
