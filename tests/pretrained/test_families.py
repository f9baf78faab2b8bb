"""Every family against logits of transformers, and back to its files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from random_weights import GOLDENS, golden, write_folder
from safetensors.numpy import load_file

from lm.errors import InputError
from lm.model import decoding
from lm.model.config import ModelConfig
from lm.model.interface import Tokens
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES, make_mesh
from lm.pretrained import huggingface
from lm.pretrained.families import FAMILIES
from lm.pretrained.family import find
from lm.pretrained.load import load_params
from lm.pretrained.source import open_pretrained

NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))

RUNTIME = {
    "attention": "auto",
    "remat": "none",
    "unroll": 0,
    "dtype": "float32",
    "param_dtype": "float32",
    "accept_aliasing": False,
    "embedding_rank": 1,
    "code_bits": 0,
    "code_values": "zero_one",
    "code_layout": "tile",
    "code_scale": 1.0,
    "code_signs": "none",
    "code_seed": 0,
}
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}

# One key a family that is changed for a negative control.
CHANGES = {
    "llama": {"rope_low_frequency": 2.0},
    "llama_linear": {"rope_factor": 3.0},
    "mistral": {"window": 6},
    "smollm3": {"layer_pattern": "G"},
    "qwen2": {"layer_pattern": "G"},
    "qwen3": {"norm_epsilon": 1e-2},
    "gemma2": {"attention_softcap": 0.0},
    "gemma3_text": {"local_rope_base": 0.0},
    "olmo2": {"rope_base": 5000.0},
    "phi3": {"rope_share": 1.0},
    "gpt2": {"activation": "relu2"},
    "gpt_neox": {"parallel_block": False},
    "gpt_neox_sequential": {"parallel_block": True},
}


def config_of(source, **changes):
    section = {**RUNTIME, **source.section, **changes}
    return ModelConfig(vocab_size=source.vocab_size, **section)


def logits_of(config, params, tokens):
    model = make_model(config, RULES)

    @jax.jit
    def run(params, tokens):
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        hidden = model.apply(params, Tokens(tokens, positions, np.ones_like(positions))).hidden
        logits = hidden @ model.head(params)
        cap = config.logit_softcap
        return cap * jax.numpy.tanh(logits / cap) if cap else logits

    return run(params, tokens)


def load(source, devices=1, **sizes):
    mesh = make_mesh({**ONE, **sizes}, jax.devices()[:devices])
    return load_params(source, make_model(config_of(source), RULES), mesh)


@pytest.fixture(
    scope="module", params=tiny.mostly_slow(NAMES, ("llama", "gpt2", "gemma3_text", "gpt_neox"))
)
def loaded(request, tmp_path_factory):
    config, shapes, tokens, logits = golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp(request.param), config, shapes)
    source = open_pretrained(str(folder))
    return request.param, source, load(source), tokens, logits


def test_logits_equal_those_of_transformers(loaded):
    name, source, params, tokens, expected = loaded
    found = logits_of(config_of(source), params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    changed = logits_of(config_of(source, **CHANGES[name]), params, tokens)
    assert np.abs(changed - expected).max() > 1e-3


def test_what_is_written_is_bit_identical_to_what_was_read(loaded, tmp_path):
    _, source, params, _, _ = loaded
    config = config_of(source)
    model_type, settings = huggingface.settings_of(config, "F32")
    assert model_type == source.model_type
    tensors = list(huggingface.entries(model_type, config, params, "F32"))
    size = huggingface.write_folder(str(tmp_path / "out"), settings, tensors, {"a.txt": "a"})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: x.tolist() for n, x in written.items()} == {
        n: stored.read().tolist() for n, stored in source.tensors.items()
    }
    assert size == sum(x.nbytes for x in written.values())
    assert (tmp_path / "out" / "a.txt").read_text() == "a"
    # Read again, its config.json gives the same function.
    (tmp_path / "out" / "tokenizer.json").write_text(source.tokenizer.definition)
    again = open_pretrained(str(tmp_path / "out"))
    assert find(FAMILIES, config_of(again)) == model_type
    same = {"head_width", "rope_factor"}
    for key, value in source.section.items():
        if key not in same and isinstance(value, (str, bool)):
            assert again.section[key] == value, key


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_half_precision_comes_back_bit_for_bit(name, tmp_path):
    import ml_dtypes

    config, shapes, _, _ = golden(name)
    halves = {}
    for tensor, shape in shapes.items():
        rng = np.random.default_rng(len(halves))
        halves[tensor] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    source = open_pretrained(str(write_folder(tmp_path / "in", config, shapes, **halves)))
    params, c = load(source), config_of(source)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    model_type, settings = huggingface.settings_of(c, "BF16")
    tensors = list(huggingface.entries(model_type, c, params, "BF16"))
    huggingface.write_folder(str(tmp_path / "out"), settings, tensors, {})
    written = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, half in halves.items():
        np.testing.assert_array_equal(written[tensor].view(np.uint16), half.view(np.uint16))


def test_many_files_onto_eight_devices_give_the_same_parameters(tmp_path):
    config, shapes, tokens, logits = golden("qwen3")
    one = load(open_pretrained(str(write_folder(tmp_path / "one", config, shapes))))
    split = open_pretrained(str(write_folder(tmp_path / "many", config, shapes, files=5)))
    many = load(split, devices=8, fsdp=4, tensor=2)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    up = many["layers"]["mlp"]["up"]
    assert up.addressable_shards[0].data.shape == (4, 8, 24)
    with jax.set_mesh(up.sharding.mesh):
        found = logits_of(config_of(split), many, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_a_vocabulary_may_grow_by_the_mean_of_its_rows(tmp_path):
    config, shapes, tokens, _ = golden("mistral")
    source = open_pretrained(str(write_folder(tmp_path, config, shapes)))
    grown = dataclasses.replace(config_of(source), vocab_size=70)
    mesh = make_mesh(ONE, jax.devices()[:1])
    params, old = load_params(source, make_model(grown, RULES), mesh), load(source)
    table = params["embedding"]["table"]
    np.testing.assert_array_equal(table[:67], old["embedding"]["table"])
    np.testing.assert_allclose(table[67:], np.tile(table[:67].mean(0), (3, 1)), atol=1e-6)
    assert params["head"]["kernel"].shape == (32, 70)
    found = logits_of(grown, params, tokens)[..., :67]
    np.testing.assert_allclose(found, logits_of(config_of(source), old, tokens), atol=1e-5)


def test_older_files_without_the_prefix_of_their_names_are_read(tmp_path):
    config, shapes, tokens, logits = golden("gpt2")
    renamed = {n: s for n, s in shapes.items()}
    from random_weights import tensor

    older = {n.removeprefix("transformer."): tensor(n, tuple(s)) for n, s in renamed.items()}
    older["h.0.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
    source = open_pretrained(str(write_folder(tmp_path, config, {}, **older)))
    found = logits_of(config_of(source), load(source), tokens)
    np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not one of: llama"),
        ({"logit_scale": 2.0}, "keys that are not known for its model_type: logit_scale=2.0"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known; valid: 'silu'"),
        ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 40}, "shape"),
        ({"num_hidden_layers": 3}, "not known: model.layers.3."),
        ({"num_hidden_layers": 5}, "missing: model.layers.4."),
        ({"vocab_size": 60}, "its tokenizer has 67 entries and its table 60 rows"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not known"),
        ({"quantization_config": {}}, "quantization_config"),
    ],
    ids=str,
)
def test_settings_that_are_not_understood_are_refused_by_name(change, expected, tmp_path):
    config, shapes, _, _ = golden("llama")
    folder = write_folder(tmp_path, config, shapes)
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as caught:
        load(open_pretrained(str(folder)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_no_family_has_is_refused_with_what_would_fit():
    base = dict.fromkeys(("layers", "heads", "kv_heads"), 2) | {"width": 32, "mlp_width": 64}
    plain = {"activation": "relu2", "norm": "rmsnorm", "embedding": "learned", "qk_norm": False}
    rest = {"tied_head": False, "code_head": False, "rope_base": 1e4, "logit_softcap": 0.0}
    made = ModelConfig(vocab_size=11, **RUNTIME, **base, **plain, **rest)
    with pytest.raises(InputError, match=r"would need .*model\.activation="):
        find(FAMILIES, made)


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(["gemma3_text", "gpt2", "smollm3"], ("gemma3_text",))
)
def test_decoding_with_a_cache_gives_the_same_logits(name, tmp_path):
    """Windows, layers without rotary positions and learned positions, one token after the other."""
    config, shapes, tokens, expected = golden(name)
    source = open_pretrained(str(write_folder(tmp_path, config, shapes)))
    params, model = load(source), make_model(config_of(source))

    @jax.jit
    def advance(tokens, positions, cache):
        return decoding.next_logits(
            model, params, tokens, positions, np.ones(tokens.shape, np.int32), cache
        )

    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    start = 16
    cache = decoding.init_cache(model, len(tokens), tokens.shape[1])
    found, cache = advance(tokens[:, :start], positions[:, :start], cache)
    for t in range(start, tokens.shape[1]):
        np.testing.assert_allclose(found, expected[:, t - 1], atol=1e-4)
        found, cache = advance(tokens[:, t : t + 1], positions[:, t : t + 1], cache)


def test_layer_by_layer_is_the_whole_pass(tmp_path):
    """As quantization after training goes through a model whose layers are of two kinds."""
    config, shapes, tokens, _ = golden("gemma3_text")
    source = open_pretrained(str(write_folder(tmp_path, config, shapes)))
    params, model = load(source), make_model(config_of(source))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.ones_like(positions)
    block = jax.jit(lambda layer, x, index: model.block(layer, x, positions, segments, layer=index))
    x, kinds = model.embed(params, tokens, positions), []
    for index in range(model.config.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        kinds.append(np.abs(block(layer, x, index) - block(layer, x, 5)).max() < 1e-6)
        x = block(layer, x, index)
    expected = model.apply(params, Tokens(tokens, positions, segments)).hidden
    np.testing.assert_allclose(model.finish(params, x), expected, atol=1e-5)
    assert kinds == [False] * 5 + [True, False]  # LLLLLG: only layer 5 sees everything.
