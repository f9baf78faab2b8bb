"""GPT-NeoX and Pythia: attention and MLP side by side, a part of each head rotated."""

from lm.pretrained.families import common
from lm.pretrained.family import Family
from lm.pretrained.tensors import by_head, same, transposed

_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def _read(s):
    activation = _ACTIVATIONS[s.only("hidden_act", *_ACTIVATIONS)]
    s.only("attention_bias", True)
    heads = s.get("num_attention_heads", int)
    base = s.get("rotary_emb_base", float, 10_000.0)
    share = s.get("rotary_pct", float, 0.25)
    return (
        {"rope_share": share}
        | common.read_rope(s, base, part=True)
        | {
            "layers": s.get("num_hidden_layers", int),
            "width": s.get("hidden_size", int),
            "heads": heads,
            "kv_heads": heads,
            "mlp_width": s.get("intermediate_size", int),
            "max_positions": s.get("max_position_embeddings", int, 2048),
            "activation": activation,
            "mlp_bias": True,
            "norm": "layernorm",
            "norm_epsilon": s.get("layer_norm_eps", float, 1e-5),
            "attention_bias": "all",
            "parallel_block": s.get("use_parallel_residual", bool, True),
            "tied_head": s.get("tie_word_embeddings", bool, False),
        }
    )


def _write(c):
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "hidden_act": names.get(c.activation),
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_positions,
        "layer_norm_eps": c.norm_epsilon,
        "use_parallel_residual": c.parallel_block,
        "attention_bias": True,
        "rotary_pct": c.rope_share,
        "rotary_emb_base": c.rope_base,
        **common.write_rope(c),
        "tie_word_embeddings": c.tied_head,
    }


def _tensors(c):
    at = "gpt_neox.layers.{}"
    qkv = [f"layers/attention/{name}" for name in ("query", "key", "value")]
    tensors = [
        same("gpt_neox.embed_in.weight", "embedding/table"),
        by_head(f"{at}.attention.query_key_value.weight", *qkv, heads=c.heads),
        by_head(f"{at}.attention.query_key_value.bias", *(f"{n}_bias" for n in qkv), heads=c.heads),
    ]
    for theirs, ours in (
        ("attention.dense", "attention/output"),
        ("mlp.dense_h_to_4h", "mlp/up"),
        ("mlp.dense_4h_to_h", "mlp/down"),
    ):
        tensors.append(transposed(f"{at}.{theirs}.weight", f"layers/{ours}"))
        tensors.append(same(f"{at}.{theirs}.bias", f"layers/{ours}_bias"))
    for theirs, ours in (
        (f"{at}.input_layernorm", "layers/attention_norm"),
        (f"{at}.post_attention_layernorm", "layers/mlp_norm"),
        ("gpt_neox.final_layer_norm", "final_norm"),
    ):
        tensors.append(same(f"{theirs}.weight", f"{ours}/scale"))
        tensors.append(same(f"{theirs}.bias", f"{ours}/bias"))
    if c.tied_head:
        return tensors
    return [*tensors, transposed("embed_out.weight", "head/kernel")]


GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    _read,
    _write,
    _tensors,
    "gpt_neox.",
    ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
