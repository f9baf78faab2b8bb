"""Whole models in GGUF files."""

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from hostile import flipped, refused
from loading import load
from random_weights import golden, tensor, write_folder
from tokenizers import decoders, models, pre_tokenizers

from lm.errors import InputError
from lm.pretrained.gguf_file import gguf_rows
from lm.pretrained.gguf_names import LAYER
from lm.pretrained.source import open_pretrained
from lm.pretrained.start import describe


def write_gguf(path, config, shapes, weights=None, **metadata):
    """The tiny Llama of a folder as llama.cpp would write it, with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>", "ss"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["s s"])
    writer.add_eos_token_id(256)
    for key, (value, kind) in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, kind)
    outer = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    layer = {theirs: ours for ours, theirs in LAYER.items()}
    for name, shape in shapes.items():
        w, (stem, ending) = tensor(name, tuple(shape)), name.rsplit(".", 1)
        if "q_proj" in name:
            w = gguf_rows(w, config["num_attention_heads"])
        if "k_proj" in name:
            w = gguf_rows(w, config["num_key_value_heads"])
        if stem in outer:
            theirs = outer[stem]
        else:
            _, _, number, rest = stem.split(".", 3)
            theirs = f"blk.{number}.{layer[rest]}"
        writer.add_tensor(f"{theirs}.{ending}", w)
    for name, w in (weights or {}).items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(tokens)}, [("s", "s")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    return made


@pytest.fixture(scope="module")
def llama():
    """config.json and shapes of a Llama with plain positions and 258 rows in its table."""
    config, shapes, _, _ = golden("llama")
    shapes = {n: [258, s[1]] if s[0] == 67 else s for n, s in shapes.items()}
    plain = {"rope_theta": 500_000.0, "rope_type": "default"}
    config = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    return config | {"vocab_size": 258, "rope_parameters": plain}, shapes


def test_a_gguf_file_gives_the_parameters_of_the_folder_that_it_was_made_of(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, shapes = llama
    made = write_gguf(tmp_path / "x.gguf", config, shapes)
    folder = write_folder(tmp_path / "model", config, shapes)
    made.save(str(folder / "tokenizer.json"))
    one, other = open_pretrained(str(folder)), open_pretrained(str(tmp_path / "x.gguf"))
    same = {k: v for k, v in one.section.items() if k not in ("head_width", "norm_epsilon")}
    assert {k: other.section[k] for k in same} == same
    assert other.section["norm_epsilon"] == pytest.approx(one.section["norm_epsilon"])
    assert (other.model_type, other.vocab_size) == (one.model_type, one.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, load(folder), load(tmp_path / "x.gguf"))
    ids, _ = other.tokenizer.encode("Grüsse\n")
    assert ids.tolist() == made.encode("Grüsse\n").ids
    assert other.tokenizer.end_of_text == 256
    # Its tokenizer has a path which a config can name, and no file twice.
    assert describe(str(tmp_path / "x.gguf")).tokenizer.endswith("/tokenizer.json")


U32, F32, STR, ARR = (
    getattr(gguf.GGUFValueType, k) for k in ("UINT32", "FLOAT32", "STRING", "ARRAY")
)


@pytest.mark.parametrize(
    ("metadata", "weights", "expected"),
    [
        ({"llama__expert_count": (8, U32)}, {}, "llama.expert_count=8 is not known"),
        ({"llama__rope__scaling__type": ("yarn", STR)}, {}, "scaling.type='yarn' is not known"),
        ({"llama__rope__scaling__type": ([1, 2], ARR)}, {}, "llama.rope.scaling.type="),
        ({"llama__rope__dimension_count": (3, U32)}, {}, "rope.dimension_count=3 must be 8"),
        ({"llama__rope__dimension_count": ([3, 3], ARR)}, {}, "rope.dimension_count="),
        ({"llama__attention__key_length": ("8", STR)}, {}, "attention.key_length='8'"),
        ({"llama__attention__value_length": (4, U32)}, {}, "attention.value_length=4 must be 8"),
        ({}, {"rope_freqs.weight": np.full(4, 3, np.float32)}, "is not the scaling of Llama 3.1"),
        ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, "must be of shape [4]"),
        ({}, {"rope_freqs.weight": np.ones((2, 2), np.float32)}, "must be of shape [4]"),
        ({}, {"blk.0.attn_sinks.weight": np.ones(2, np.float32)}, "not known: blk.0.attn_sinks"),
        ({}, {"blk.9.attn_norm.weight": np.ones(32, np.float32)}, "model.layers.9.input"),
    ],
    ids=range(12),
)
def test_what_a_gguf_file_says_must_be_understood(
    metadata, weights, expected, llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "x.gguf", *llama, weights, **metadata)
    refused(load, tmp_path / "x.gguf", expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", 0),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 10**9),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_a_gguf_file_too(
    key, value, llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, shapes = llama
    heads = {k: config[k] for k in ("num_attention_heads", "num_key_value_heads")}
    broken = config | {key: value}
    if key in heads and not value % 2:  # Rows cannot be ordered by no heads.
        shapes = {n: s for n, s in shapes.items() if "q_proj" not in n}
    if value == 3:
        shapes = {n: s for n, s in shapes.items() if "k_proj" not in n}
    write_gguf(tmp_path / "x.gguf", broken, shapes)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "x.gguf")
    assert str(caught.value).isprintable()


def test_no_copy_in_the_cache_is_named_for_a_bad_tokenizer(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, shapes = llama
    write_gguf(tmp_path / "x.gguf", config, shapes)
    content = (tmp_path / "x.gguf").read_bytes()
    key = b"tokenizer.ggml.eos_token_id"
    assert content.count(key) == 1
    (tmp_path / "x.gguf").write_bytes(content.replace(key, key[:-2] + b"xx"))
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(b"</s>", b"<xx>"))
    with pytest.raises(InputError, match=r"^.*x\.gguf: .*declares no end of text"):
        open_pretrained(str(tmp_path / "x.gguf"))


def test_random_damage_to_a_model_is_refused_in_one_line_or_harmless(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "x.gguf", *llama)
    whole, read = (tmp_path / "x.gguf").read_bytes(), 0
    tensors = sum(4 * int(np.prod(shape)) for shape in llama[1].values())
    for seed in range(300):
        most = 700 if seed % 2 else len(whole) - tensors
        (tmp_path / "x.gguf").write_bytes(flipped(whole, seed, most))
        try:
            open_pretrained(str(tmp_path / "x.gguf"))
            read += 1
        except InputError:
            refused(open_pretrained, str(tmp_path / "x.gguf"))
    assert 0 < read < 150
