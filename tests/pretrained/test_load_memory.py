"""Host memory while a model is loaded."""

import jax
import numpy as np
from hostile import peak_bytes
from loading import load
from random_weights import golden, write_folder

from lm.pretrained.source import open_pretrained


def test_memory_beside_the_parameters_is_about_two_tensors(tmp_path):
    """What Python and NumPy allocate at a time; parameters are in buffers of JAX, which tracemalloc
    does not see, and files are mapped. All tensors at once would be 24 times the largest.
    """
    config, _, _, _ = golden("llama")
    width, wide, layers = 128, 4096, 8
    config = config | {"attention_bias": False, "mlp_bias": False}
    sizes = {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": layers}
    shapes = {"model.embed_tokens.weight": (67, width), "model.norm.weight": (width,)}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes["head_dim"] = head = width // heads
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (67, width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, heads * head)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (wide, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (wide, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, wide)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (width,)
    folder = write_folder(tmp_path, config | sizes, shapes, files=3)
    load(folder)  # Compiles what puts a layer into its stack.
    source = open_pretrained(str(folder))
    largest = 4 * wide * width
    total = sum(4 * int(np.prod(s)) for s in shapes.values())
    assert total > 24 * largest
    peak = peak_bytes(lambda: jax.block_until_ready(load(folder)))
    assert peak < 3 * largest
    # Negative control: a reader that has all of them in memory.
    whole = peak_bytes(lambda: [np.array(s.read()) for s in source.tensors.values()])
    assert whole > 24 * largest
