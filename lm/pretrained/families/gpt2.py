"""GPT-2: learned positions, LayerNorm and biases; weights are [in, out] in its files."""

from lm.pretrained.family import Family
from lm.pretrained.tensors import same, stacked, transposed


def _read(s):
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    s.ignore("reorder_and_upcast_attn")
    width, heads = s.get("n_embd", int), s.get("n_head", int)
    return {
        "layers": s.get("n_layer", int),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "mlp_width": s.get("n_inner", int, 4 * width),
        "activation": "gelu",
        "mlp_bias": True,
        "norm": "layernorm",
        "norm_epsilon": s.get("layer_norm_epsilon", float, 1e-5),
        "attention_bias": "all",
        "positions": "learned",
        "max_positions": s.get("n_positions", int, 1024),
        "tied_head": s.get("tie_word_embeddings", bool, True),
    }


def _write(c):
    return {
        "activation_function": "gelu_new",
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.mlp_width,
        "n_positions": c.max_positions,
        "layer_norm_epsilon": c.norm_epsilon,
        "tie_word_embeddings": c.tied_head,
    }


def _tensors(c):
    at = "transformer.h.{}"
    qkv = [f"layers/attention/{name}" for name in ("query", "key", "value")]
    tensors = [
        same("transformer.wte.weight", "embedding/table"),
        same("transformer.wpe.weight", "positions/table"),
        stacked(f"{at}.attn.c_attn.weight", *qkv, transpose=False),
        stacked(f"{at}.attn.c_attn.bias", *(f"{n}_bias" for n in qkv), transpose=False),
    ]
    for theirs, ours in (
        ("attn.c_proj", "attention/output"),
        ("mlp.c_fc", "mlp/up"),
        ("mlp.c_proj", "mlp/down"),
    ):
        tensors.append(same(f"{at}.{theirs}.weight", f"layers/{ours}"))
        tensors.append(same(f"{at}.{theirs}.bias", f"layers/{ours}_bias"))
    for theirs, ours in (
        (f"{at}.ln_1", "layers/attention_norm"),
        (f"{at}.ln_2", "layers/mlp_norm"),
        ("transformer.ln_f", "final_norm"),
    ):
        tensors.append(same(f"{theirs}.weight", f"{ours}/scale"))
        tensors.append(same(f"{theirs}.bias", f"{ours}/bias"))
    return tensors if c.tied_head else [*tensors, transposed("lm_head.weight", "head/kernel")]


GPT2 = Family(
    "GPT2LMHeadModel", _read, _write, _tensors, "transformer.", (".attn.bias", ".attn.masked_bias")
)
