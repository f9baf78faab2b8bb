"""A packed file gives the quantized parameters back, takes the bytes it should, or is refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lm.compression import packed
from lm.compression.packed import code_leaves, read_packed, write_packed
from lm.compression.phases import default_rules
from lm.errors import InputError
from objectives.quantization import (
    QUANTIZERS,
    absmax,
    elastic_binary,
    init_scales,
    mixed,
    packed_size,
    paretoq,
    quantize_tree,
)

WIDTHS = {
    "elastic_binary": (1,),
    "ternary": (1.58,),
    "seq": (2,),
    "learned_range": (2, 3, 4, 5, 6, 7, 8),
    "lsq": (3, 4, 5, 6, 7, 8),
    "absmax": (2, 3, 4, 5, 6, 7, 8),
    "minmax": (2, 3, 4, 5, 6, 7, 8),
    "dense_shift": (2, 3, 4),
    "mxfp4": (4,),
    "nvfp4": (4,),
    "fp8_e4m3": (8,),
    "fp8_e5m2": (8,),
}
CONFIG = {"model": {"width": 32}, "data": {"mixture_weights": []}}


def write(path, params, scales, rules):
    leaves = code_leaves(params, scales, rules)
    about = {"config": CONFIG, "vocab_size": 37, "tokenizer": "", "step": 5}
    return write_packed(path, leaves, **about)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def normal(*shape, dtype=jnp.float32, seed=0):
    w = jax.random.normal(jax.random.key(seed), shape)
    return (w * jnp.exp(jnp.linspace(-3, 3, shape[-1]))).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"paretoq"}))
def test_every_quantizer_width_and_granularity(name, tmp_path):
    """Stacked leaves [L, I, O]; a table with scales by row; bfloat16; a weight that is zero."""
    cases = [(bits, "channel", jnp.float32) for bits in WIDTHS[name]]
    cases += [(WIDTHS[name][0], g, jnp.bfloat16) for g in ("tensor", "group")]
    params = {"embedding": {"table": normal(6, 32, seed=9)}, "layers": {}}
    table = QUANTIZERS[name](bits=WIDTHS[name][-1], contraction_axis=-1)
    by_path = {"embedding/table": table, "layers/scale": None}
    for i, (bits, granularity, dtype) in enumerate(cases):
        weights = normal(3, 32, 5, dtype=dtype, seed=i)
        params["layers"][f"m{i}"] = weights.at[1, 2, 3].set(0)
        quantizer = QUANTIZERS[name](bits=bits, granularity=granularity, group_size=8)
        by_path[f"layers/m{i}"] = quantizer
    params["layers"]["scale"] = normal(3, 32, dtype=jnp.bfloat16)
    rules = by_path.__getitem__
    # Scales as training leaves them, not as they start.
    scales = jax.jit(lambda p: jax.tree.map(lambda a: 0.7 * a, init_scales(p, rules)))(params)
    size = write(tmp_path / "model.safetensors", params, scales, rules)
    found = read_packed(tmp_path / "model.safetensors")
    expected = jax.jit(lambda p, s: quantize_tree(p, s, rules))(params, scales)
    assert_same(found.params, expected)
    assert found[:4] == (CONFIG, 37, "", 5)
    assert set(found.quantizers) == {
        "embedding/table",
        *(f"layers/m{i}" for i in range(len(cases))),
    }

    # Bit-tight codes, float32 scales, and nothing else but the header.
    expected_size = params["layers"]["scale"].nbytes
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for path, quantizer in found.quantizers.items():
        leaf = params["embedding"]["table"] if "/table" in path else params["layers"][path[7:]]
        grid = jax.eval_shape(lambda w, q=quantizer: q.grid(w, q.init(w)), leaf)
        expected_size += packed_size(leaf.size, quantizer.bits) + 4 * grid.scale.size
        expected_size += 0 if grid.zero is None else 4 * grid.zero.size
        zeros = 8 * (name == "elastic_binary" and "table" not in path)
        assert tensors.get(f"{path}.exact_zeros", np.zeros(0)).nbytes == zeros
        expected_size += zeros
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert size == len(raw) == header + expected_size
    # Negative control: the parameters themselves are something else.
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of 4 bits a weight, and what it was made of."""
    params = {
        "embedding": {"table": normal(64, 128)},
        "layers": {"mlp": {"up": normal(4, 128, 512), "down": normal(4, 512, 128)}},
        "final_norm": {"scale": jnp.ones(128)},
    }
    rules = default_rules(4)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    write(path, params, init_scales(params, rules), rules)
    return path, params, rules


def test_four_bits_are_an_eighth_of_float32(model):
    path, params, _ = model
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 1 / 8 < path.stat().st_size / whole < 1.1 / 8


def test_the_header_says_what_is_inside(model):
    with safe_open(model[0], "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == CONFIG
    row = {"name": "lsq", "bits": 4, "granularity": "channel", "group_size": 0}
    quantizers = [row | {"contraction_axis": -1}, row | {"contraction_axis": -2}]
    assert json.loads(metadata["quantizers"]) == quantizers
    leaves = json.loads(metadata["leaves"])
    assert leaves["layers/mlp/up"] == {"shape": [4, 128, 512], "dtype": "float32", "quantizer": 1}
    assert leaves["final_norm/scale"]["quantizer"] is None


def rewrite(path, target, **changes):
    """A file like `path`, whole as a safetensors file, with other metadata."""
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    if "checksum" not in changes:
        del metadata["checksum"]
        metadata["checksum"] = str(packed._checksum_of_text(metadata))
    save_file(tensors, target, metadata)


def flip(raw, position):
    return raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "not a whole safetensors file"),
        (lambda raw: raw[:20], "not a whole safetensors file"),
        (lambda raw: b"", "not a whole safetensors file"),
        (lambda raw: b"text, " * 40, "not a whole safetensors file"),
        (lambda raw: flip(raw, len(raw) - 9), r"damaged \(the checksum of .* is wrong"),
        (lambda raw: raw.replace(b'\\"width\\":', b'\\"wodth\\":'), "checksum of the header"),
    ],
    ids=["cut", "header cut", "empty", "text", "codes", "config"],
)
def test_damage_is_one_line(model, damage, reason, tmp_path):
    raw = model[0].read_bytes()
    assert damage(raw) != raw
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damage(raw))
    with pytest.raises(InputError, match=reason) as error:
        read_packed(bad)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": None}, "a safetensors file, but not a packed model"),
        ({"version": "3"}, "format version 3; this program reads 1 and 2"),
        ({"leaves": "[1]"}, "damaged"),
        ({"leaves": '{"layers/mlp/sideways": {"shape": [1], "dtype": "float32"}}'}, "damaged"),
        ({"quantizers": '[{"name": "lsqq"}]'}, r"damaged \(KeyError: 'lsqq'\)"),
        ({"step": "many"}, "damaged"),
    ],
)
def test_a_foreign_file_is_one_line(model, changes, reason, tmp_path):
    rewrite(model[0], tmp_path / "same.safetensors")
    read_packed(tmp_path / "same.safetensors")  # it is the change that is refused
    rewrite(model[0], tmp_path / "other.safetensors", **changes)
    with pytest.raises(InputError, match=reason) as error:
        read_packed(tmp_path / "other.safetensors")
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    _, params, rules = model
    scales = init_scales(params, rules)
    path = tmp_path / "model.safetensors"
    write(path, params, scales, rules)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk\nfull")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be written: disk full"):
        write(path, params, scales, rules)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_cannot_be_packed_is_named(model, tmp_path):
    _, params, rules = model
    scales = init_scales(params, rules)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "nowhere" / "model.safetensors", params, scales, rules)
    broken = params | {"embedding": {"table": params["embedding"]["table"].at[3, 4].set(jnp.nan)}}
    with pytest.raises(InputError, match="embedding/table has weights that are not finite"):
        write(tmp_path / "model.safetensors", broken, scales, rules)
    with pytest.raises(InputError, match="no such file"):
        read_packed(tmp_path / "model.safetensors")


STACKS = {
    "a": [paretoq(bits) for bits in (2, 1.58, 8)],
    "b": [elastic_binary(), paretoq(3), elastic_binary()],
    "c": [absmax(bits, granularity="group", group_size=8) for bits in (2, 5, 3)],
}


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """A file of leaves whose layers have widths of their own, and what it was made of."""
    params = {"layers": {n: normal(3, 32, 5, seed=i) for i, n in enumerate(STACKS)}}
    params["layers"]["b"] = params["layers"]["b"].at[2, 1, 3].set(0)
    rules = {f"layers/{name}": mixed(members) for name, members in STACKS.items()}.__getitem__
    path = tmp_path_factory.mktemp("stacks") / "model.safetensors"
    scales = init_scales(params, rules)
    size = write(path, params, scales, rules)
    return path, params, scales, rules, size


def test_layers_of_several_widths_come_back_and_take_their_own_bytes(stacks):
    path, params, scales, rules, size = stacks
    found = read_packed(path)
    assert_same(found.params, jax.jit(lambda p, s: quantize_tree(p, s, rules))(params, scales))
    for name, members in STACKS.items():
        bits = tuple(q.bits for q in members)
        assert found.quantizers[f"layers/{name}"].widths == bits
        for i, layer in enumerate(found.coded[f"layers/{name}"].layers()):
            assert layer.quantizer.bits == bits[i]
            np.testing.assert_array_equal(layer.decode(), found.params["layers"][name][i])
    codes = sum(packed_size(160, q.bits) for members in STACKS.values() for q in members)
    expected = codes + 4 * 3 * (5 + 5 + 4 * 5) + 8
    raw = path.read_bytes()
    assert size == len(raw) == 8 + int.from_bytes(raw[:8], "little") + expected
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["version"] == "2"
    assert json.loads(metadata["leaves"])["layers/b"]["quantizer"] == [3, 4, 3]


def test_a_stack_of_one_width_is_the_file_of_a_plain_quantizer(model, tmp_path):
    path, params, rules = model
    quantizer, choices = rules("layers/mlp/up"), [paretoq(2), paretoq(8)]

    def stacked(name):
        return mixed([quantizer] * 4, choices) if name.startswith("layers/") else rules(name)

    def content(path):
        """Header and tensors; safetensors itself has no order of the header's metadata."""
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        return len(raw), json.loads(raw[8:start]), raw[start:]

    write(tmp_path / "same.safetensors", params, init_scales(params, stacked), stacked)
    assert content(tmp_path / "same.safetensors") == content(path)
    # Negative control: the indices of the scale count, and they change the file.
    scales = init_scales(params, stacked)
    up = scales["layers"]["mlp"]["up"]
    index = up.index.at[1].set(0)
    scales["layers"]["mlp"]["up"] = up._replace(index=index)
    write(tmp_path / "other.safetensors", params, scales, stacked)
    assert content(tmp_path / "other.safetensors") != content(path)
    assert read_packed(tmp_path / "other.safetensors").quantizers["layers/mlp/up"].widths == (
        *(4, 2, 4, 4),
    )


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ([0, 1], "2 quantizers for the layers"),
        ([], "0 quantizers for the layers"),
        ([0, 1, 99], "IndexError"),
        ([0, 1, "2"], "TypeError"),
        ([0, 1, [2]], "TypeError"),
        ([0, 1, None], "TypeError"),
        ([0, 5, 2], "one layout"),
        ([2, 1, 2], r"take .* bytes; got"),
        ({"0": 1}, "TypeError"),
    ],
)
def test_hostile_lists_of_quantizers_are_one_line(stacks, described, reason, tmp_path):
    with safe_open(stacks[0], "np") as file:
        leaves = json.loads(file.metadata()["leaves"])
    leaves["layers/a"]["quantizer"] = described
    rewrite(stacks[0], tmp_path / "bad.safetensors", leaves=json.dumps(leaves))
    with pytest.raises(InputError, match=r"damaged \(.*" + reason) as error:
        read_packed(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_damaged_codes_of_a_stack_are_seen(stacks, tmp_path):
    raw = stacks[0].read_bytes()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(flip(raw, 8 + int.from_bytes(raw[:8], "little") + 3))
    with pytest.raises(InputError, match=r"the checksum of .* is wrong"):
        read_packed(bad)
