"""What other programs read: packed integers, GGUF blocks and adapters, from tiny models."""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
import tiny
import tokenizers
from loading import load
from random_weights import golden, write_folder
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from configs import finetune
from lm.compression.after_training import round_to_nearest_model, with_scales
from lm.compression.integer_grids import integer_grid, round_scales
from lm.errors import InputError
from lm.model import adapters
from lm.model.config import ModelConfig
from lm.model.parameters import parameter_kind, path_of
from lm.model.transformer import make_model
from lm.pretrained import compressed_tensors, gguf_writer, huggingface, peft
from lm.pretrained.source import open_pretrained
from objectives.quantization import QUANTIZERS


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(source, config, parameters) of a tiny Qwen3, whose matrices have 32, 48 or 64 inputs."""
    config, shapes, _, _ = golden("qwen3")
    source = open_pretrained(str(write_folder(tmp_path_factory.mktemp("qwen"), config, shapes)))
    section = finetune.get_config(source.where, source).model.to_dict()
    config = ModelConfig(vocab_size=source.vocab_size, **section)
    return source, config, load(source.where)


def quantized(params, bits, name="absmax", scales="float16", **layout):
    quantizer = QUANTIZERS[name](bits=bits, **layout)

    def rules(path):
        return quantizer if parameter_kind(path) == "matrix" else None

    return with_scales(round_to_nearest_model(params, rules), scales)


def grids_of(result):
    return {path: integer_grid(path, coded) for path, coded in result.coded.items()}


CHANNEL = {"granularity": "channel"}
GROUP = {"granularity": "group", "group_size": 16}


@pytest.mark.parametrize(
    ("bits", "layout"), tiny.rows_mostly_slow([(4, GROUP), (8, CHANNEL), (8, GROUP)], (0,))
)
def test_packed_words_hold_the_weights_that_were_evaluated(qwen, bits, layout, tmp_path):
    _, config, params = qwen
    result = quantized(params, bits, **layout)
    grids = grids_of(result)
    compressed_tensors.check(bits, grids, "F16")
    tensors = compressed_tensors.packed_entries("qwen3", config, result.params, grids, "F16", bits)
    huggingface.write_folder(str(tmp_path / "out"), {}, tensors, {})
    found = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(config.layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        words, scale = found[f"{name}_packed"], found[f"{name}_scale"]
        out, inputs = found[f"{name}_shape"]
        assert scale.dtype == np.float16
        # As the format says, word by word.
        codes = np.zeros((out, inputs), np.int64)
        for k in range(32 // bits):
            codes[:, k :: 32 // bits] = (words >> (bits * k)) & (2**bits - 1)
        codes -= 2 ** (bits - 1)
        spread = np.repeat(scale.astype(np.float32), inputs // scale.shape[1], axis=1)
        expected = np.asarray(result.params["layers"]["mlp"]["down"][layer]).T
        np.testing.assert_array_equal(spread * codes.astype(np.float32), expected)
    described = compressed_tensors.quantization_config(bits, layout.get("group_size", 0))
    described = described["config_groups"]["group_0"]
    strategy = "channel" if layout is CHANNEL else "group"
    assert (described["weights"]["strategy"], described["weights"]["num_bits"]) == (strategy, bits)


@pytest.mark.parametrize(
    ("bits", "name", "kind", "size"),
    tiny.rows_mostly_slow(
        [
            (8, "absmax", "Q8_0", 32),
            (4, "absmax", "Q4_0", 32),
            (3, "lsq", "Q4_0", 32),
            (4, "minmax", "Q4_1", 32),
            (2, "minmax", "Q4_1", 64),
        ],
        (0, 3),
    ),
)
def test_blocks_decode_to_the_weights_that_were_evaluated(bits, name, kind, size):
    rng = np.random.default_rng(0)
    params = {"layers": {"mlp": {"up": rng.standard_normal((2, 64, 6)).astype(np.float32)}}}
    result = quantized(params, bits, name, granularity="group", group_size=size)
    (grid,) = grids_of(result).values()
    assert gguf_writer.block_type("layers/mlp/up", grid) == kind
    codes, scale, *minimum = (x[1].T for x in grid if x is not None)
    raw = gguf_writer.blocks_of(codes, scale, kind, *minimum)
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found, np.asarray(result.params["layers"]["mlp"]["up"][1]).T)


def test_ternary_weights_fill_blocks_of_256():
    rng = np.random.default_rng(0)
    params = {"layers": {"mlp": {"up": rng.standard_normal((1, 512, 3)).astype(np.float32)}}}
    result = quantized(params, 1.58, "ternary", granularity="channel")
    (grid,) = grids_of(result).values()
    assert gguf_writer.block_type("layers/mlp/up", grid) == "TQ2_0"
    raw = gguf_writer.blocks_of(grid.codes_LIO[0].T, grid.scale_LGO[0].T, "TQ2_0")
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.TQ2_0)
    np.testing.assert_array_equal(found, np.asarray(result.params["layers"]["mlp"]["up"][0]).T)


def test_scales_are_rounded_before_they_are_used(qwen):
    _, _, params = qwen
    exact = quantized(params, 4, scales="float32", **GROUP)
    (path, coded), *_ = exact.coded.items()
    with pytest.raises(InputError, match=r"quantize with --scales=float16"):
        compressed_tensors.check(4, {path: integer_grid(path, coded)}, "F16")
    rounded = round_scales(coded, "float16")
    scale = np.asarray(rounded.grid.scale)
    np.testing.assert_array_equal(scale, np.asarray(coded.grid.scale).astype(np.float16))
    assert not np.array_equal(rounded.decode(), coded.decode())


@pytest.mark.parametrize(
    ("name", "bits"),
    tiny.rows_mostly_slow([("seq", 2), ("elastic_binary", 1), ("dense_shift", 3)], (0,)),
)
def test_a_grid_that_no_format_holds_is_refused_with_what_fits(qwen, name, bits):
    _, _, params = qwen
    result = quantized(params, bits, name, scales="float32")
    (path, coded), *_ = result.coded.items()
    with pytest.raises(InputError, match=rf"{name} with {bits} bits.*valid: --quantizer=absmax"):
        integer_grid(path, coded)


def test_groups_that_do_not_fill_blocks_are_refused(qwen):
    _, _, params = qwen
    grids = grids_of(quantized(params, 4, **GROUP))
    with pytest.raises(InputError, match=r"valid: --granularity=group --group_size=32"):
        gguf_writer.block_type("layers/mlp/down", grids["layers/mlp/down"])
    asymmetric = grids_of(quantized(params, 4, "minmax", **GROUP))
    with pytest.raises(InputError, match="written for symmetric grids"):
        compressed_tensors.check(4, asymmetric, "F32")
    with pytest.raises(InputError, match="has 4 and 8 bits, and the model 3"):
        compressed_tensors.check(3, grids, "F32")


def test_adapters_are_named_as_peft_names_them(qwen, tmp_path):
    source, base, _ = qwen
    config = dataclasses.replace(
        base, adapter_rank=2, adapter_alpha=8.0, adapter_matrices="attention/(query|value)"
    )
    params = jax.device_get(make_model(config).init(jax.random.key(0)))
    settings = peft.adapter_settings(config, "qwen3", source.where)
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert (settings["r"], settings["lora_alpha"]) == (2, 8.0)
    tensors = peft.adapter_entries(config, "qwen3", params, "F32")
    huggingface.write_folder(
        str(tmp_path / "out"), settings, tensors, {}, settings_name="adapter_config.json"
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == settings
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found) == 4 * base.layers
    attention = params["layers"]["attention"]
    merged = adapters.merge(config, params)["layers"]["attention"]["query"]
    for layer in range(base.layers):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        a, b = found[f"{at}.lora_A.weight"], found[f"{at}.lora_B.weight"]
        dense = attention["query"][layer].T + 8.0 / 2 * b @ a
        np.testing.assert_allclose(dense, np.asarray(merged[layer]).T, atol=1e-5)
    with pytest.raises(InputError, match="has no adapters"):
        peft.adapter_settings(base, "qwen3", "")


def gguf_folder(folder, name):
    """A tiny Hugging Face folder with a byte-level tokenizer, which GGUF has a name for."""
    config, shapes, _, _ = golden(name)
    config = {**config, "vocab_size": 300}
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        if tensor in shapes:
            shapes[tensor] = [300, shapes[tensor][1]]
    write_folder(folder, config, shapes)
    made = Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["the quick brown fox and the lazy dog " * 3, "one two three"] * 9, trainer
    )
    made.save(str(folder / "tokenizer.json"))
    return open_pretrained(str(folder))


@pytest.mark.parametrize("grids", tiny.mostly_slow(["floats", "codes"], ("codes",)))
def test_a_whole_gguf_is_read_back_as_it_was(grids, tmp_path):
    source = gguf_folder(tmp_path / "in", "qwen3")
    section = finetune.get_config(source.where, source).model.to_dict()
    config = ModelConfig(vocab_size=source.vocab_size, **section)
    params, held = load(source.where), {}
    if grids == "codes":
        # Of the matrices those with 32 or 64 inputs.
        result = quantized(params, 8, granularity="channel")
        held = {p: g for p, g in grids_of(result).items() if g.codes_LIO.shape[1] % 32 == 0}
        kept = {path: path in held for path in result.coded}
        params = jax.tree_util.tree_map_with_path(
            lambda keys, new, old: new if kept.get(path_of(keys)) else old, result.params, params
        )
    path = str(tmp_path / "out.gguf")
    gguf_writer.write_gguf(path, "qwen3", config, params, source.tokenizer, "F32", held)
    again = open_pretrained(path)
    assert {k: again.section[k] for k in source.section} == source.section
    jax.tree.map(np.testing.assert_array_equal, load(path), params)
    text = "the lazy dog, 12 quick!"
    np.testing.assert_array_equal(again.tokenizer.encode(text)[0], source.tokenizer.encode(text)[0])
    assert bool(held) == (grids == "codes")


def test_a_scaling_that_gguf_lacks_is_refused(tmp_path):
    source = gguf_folder(tmp_path / "in", "llama_linear")
    section = finetune.get_config(source.where, source).model.to_dict()
    config = ModelConfig(vocab_size=source.vocab_size, **section)
    path = str(tmp_path / "out.gguf")
    with pytest.raises(InputError, match=r"no model\.rope_scaling=linear"):
        gguf_writer.write_gguf(path, "llama", config, {}, source.tokenizer, "F32", {})
    assert not (tmp_path / "out.gguf").exists()
