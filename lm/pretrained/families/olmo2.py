"""OLMo 2: norms behind the sub-blocks, and on whole queries and keys (arXiv 2501.00656)."""

from lm.pretrained.families import common
from lm.pretrained.family import Family

_NORMS = {
    "post_attention_layernorm": "attention_norm_after",
    "post_feedforward_layernorm": "mlp_norm_after",
}


def _read(s):
    s.only("hidden_act", "silu")
    return (
        common.read_sizes(s)
        | common.read_rope(s)
        | {
            "activation": "swiglu",
            "norm_epsilon": s.get("rms_norm_eps", float, 1e-5),
            "norm_placement": "after",
            "qk_norm": True,
            "qk_norm_scope": "all",
            "attention_bias": "all" if s.get("attention_bias", bool, False) else "none",
            "tied_head": s.get("tie_word_embeddings", bool, False),
        }
    )


def _write(c):
    settings = {
        "hidden_act": "silu",
        **common.write_sizes(c),
        **common.write_rope(c),
        "rms_norm_eps": c.norm_epsilon,
        "attention_bias": c.attention_bias == "all",
        "tie_word_embeddings": c.tied_head,
    }
    if c.head_width * c.heads == c.width:
        del settings["head_dim"]
    return settings


def _tensors(c):
    return common.layer_tensors(c, _NORMS) + common.outer_tensors(c)


OLMO2 = Family("Olmo2ForCausalLM", _read, _write, _tensors)
