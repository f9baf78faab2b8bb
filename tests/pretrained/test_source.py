"""Hugging Face folders and GGUF files as a whole: what is refused, and in which words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hostile import peak_bytes, refused
from loading import load
from random_weights import golden, tensor, write_folder

from configs import finetune
from lm.errors import InputError
from lm.pretrained.source import is_pretrained, open_pretrained
from lm.pretrained.start import describe

ROOT = Path(__file__).parent.parent.parent
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A whole folder of a tiny Llama in three files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, shapes, _, _ = golden("llama")
    return write_folder(tmp_path / "model", config, shapes, files=3)


def rewrite(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_is_none_is_refused(folder, tmp_path):
    config = folder / "config.json"
    refused(open_pretrained, str(tmp_path / "nothing"), "no such folder")
    for content, expected in [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["model_type"]', "must be a JSON object, got list"),
        (b"{}", "model_type='None' is not one of: llama"),
        (b'{"model_type": ["llama"]}', "is not one of: llama"),
        (json.dumps({"model_type": "x\n" * 9999}).encode(), "is not one of: llama"),
    ]:
        config.write_bytes(content)
        refused(open_pretrained, str(folder), expected)
    os.truncate(config, 100 * 2**20)  # A sparse file.
    peak = peak_bytes(lambda: refused(open_pretrained, str(folder), "are too many"))
    assert peak < 100_000
    config.unlink()
    refused(open_pretrained, str(folder), "there is no config.json in it")
    assert not is_pretrained(str(folder))
    config.mkdir()
    refused(open_pretrained, str(folder), "there is no config.json in it")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 2**30}, "must be at most 1,000"),
        ({"head_dim": 2**39}, "head_dim=549755813888 is out of range"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is out of range"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size=True must be of type int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is out of range"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"a\x1b[31m\n" * 50: 1}, "keys that are not known"),
        ({"b" * 10_000: "c" * 10_000}, "keys that are not known"),
        ({"hidden_act": {"a": ["\n"]}}, "hidden_act="),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -4.0}, "query_pre_attn_scalar"),
    ],
    ids=range(14),
)
def test_numbers_and_keys_out_of_range_are_refused_in_one_short_line(changes, expected, folder):
    if "gemma2" in changes.values() or "smollm3" in changes.values():
        config, _, _, _ = golden(changes["model_type"])
        (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / "config.json", **changes)
    peak = peak_bytes(lambda: refused(open_pretrained, str(folder), expected))
    assert peak < 2_000_000


def test_an_index_names_files_beside_it_and_nothing_else(folder, tmp_path):
    index = folder / INDEX
    places = json.loads(index.read_text())["weight_map"]
    name = next(iter(places))
    (tmp_path / "out.safetensors").write_bytes((folder / places[name]).read_bytes())
    for place in (
        "../../etc/passwd",
        "../out.safetensors",
        str(tmp_path / "out.safetensors"),
        "sub/x.safetensors",
        "config.json",
        "..",
        "",
        "x" * 5000 + ".safetensors",
    ):
        rewrite(index, weight_map=places | {name: place})
        refused(open_pretrained, str(folder), "is not the name of a .safetensors file beside it")
    for place in ("gone.safetensors", "a\0b.safetensors", "\ud800.safetensors"):
        rewrite(index, weight_map=places | {name: place})
        refused(open_pretrained, str(folder), "is missing")
    for wrong in ([], {name: 3}, None):
        rewrite(index, weight_map=wrong)
        refused(open_pretrained, str(folder), "weight_map must map names of tensors")
    rewrite(index, weight_map=places | {"more": places[name]})
    refused(open_pretrained, str(folder), f"{places[name]} has no tensor more")
    index.write_text("{")
    refused(open_pretrained, str(folder), "not JSON")


def test_links_are_followed_as_the_cache_of_hugging_face_is_made_of_them(folder, tmp_path):
    expected = load(folder)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


def test_pickles_are_never_read(folder):
    for path in (folder / INDEX, *folder.glob("*.safetensors")):
        path.unlink()
    refused(open_pretrained, str(folder), "neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    line = refused(open_pretrained, str(folder), "pytorch_model.bin is a pickle")
    assert "safe_serialization=True" in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    config, shapes, _, _ = golden("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    bad = tensor(name, tuple(shapes[name]))
    bad[-1, -1] = value
    folder = write_folder(tmp_path, config, shapes, **{name: bad})
    refused(load, folder, f"{name} has values that are not finite")


def test_tensors_that_are_missing_or_too_many_are_listed(tmp_path):
    config, shapes, _, _ = golden("llama")
    last = "model.layers.{}.mlp.up_proj.weight"
    changes = {last.format(i): None for i in range(2)} | {"a\n": np.zeros(3), "b": np.zeros(3)}
    changes = {k: v if v is None else v.astype(np.float32) for k, v in changes.items()}
    folder = write_folder(tmp_path / "a", config, shapes, **changes)
    line = refused(load, folder, f"missing: {last.format(0)}, {last.format(1)}; ")
    assert r"not known: 'a\n', b" in line
    norm = {"model.norm.weight": np.ones(7, np.float32)}
    folder = write_folder(tmp_path / "b", config, shapes, **norm)
    refused(load, folder, "model.norm.weight has the shape [7], and its config.json says [32]")
    many = {f"m{i}": np.zeros(1, np.float32) for i in range(9)}
    folder = write_folder(tmp_path / "c", config, shapes, **many)
    refused(load, folder, "m4 and 4 more")


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]

    def write(**entries):
        model = definition["model"] | {"vocab": vocabulary | entries}
        path.write_text(json.dumps(definition | {"model": model}))

    write(more=len(vocabulary))
    refused(open_pretrained, str(folder), "its tokenizer has 68 entries and its table 67 rows")
    # An id that would make arrays of 8 GB.
    write(more=2**31)
    peak = peak_bytes(lambda: refused(open_pretrained, str(folder), "an id is not below"))
    assert peak < 5_000_000
    path.write_text("{}")
    refused(open_pretrained, str(folder), "not a tokenizer.json")
    path.write_bytes(b"\xff")
    refused(open_pretrained, str(folder), "cannot be read")
    os.truncate(path, 2**33)
    refused(open_pretrained, str(folder), "are too many")
    path.unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    refused(open_pretrained, str(folder), "tokenizer.model alone is not read")


def test_a_vocabulary_that_is_too_small_is_refused_and_one_as_large_as_the_width_is_none(tmp_path):
    config, shapes, _, _ = golden("llama")
    rows = {n: tensor(n, (30, 32)) for n in shapes if shapes[n] == [67, 32]}
    assert rows
    folder = write_folder(tmp_path, config | {"vocab_size": 30}, shapes, **rows)
    refused(lambda path: load(path, 20), folder, "its table has 30 rows, more than the 20")
    table = load(folder, 32)["embedding"]["table"]  # 32 is the width, too.
    assert table.shape == (32, 32)
    np.testing.assert_allclose(table[31], table[:30].mean(0), atol=1e-6)


def test_models_of_others_and_runs_are_told_apart(folder, tmp_path):
    assert is_pretrained(str(folder))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"model": {}}, "vocab_size": 3}))
    assert not is_pretrained(str(run))
    assert not is_pretrained(str(tmp_path))
    assert not is_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(is_pretrained, str(tmp_path), "adapters without their model")
    assert is_pretrained(str(tmp_path / "nothing.gguf"))
    refused(open_pretrained, str(tmp_path / "nothing.gguf"), "no such file")
    with pytest.raises(InputError, match="neither that of a run nor of a model"):
        describe(str(run))
    ends = {"tokenizer": "bytes", "end_of_text": "", "beginning_of_text": ""}
    for model in ({"bogus": 1}, {"layers": "4"}, {"width": 2.5}):
        record = {"config": {"model": model, "data": ends}, "vocab_size": 257}
        (run / "config.json").write_text(json.dumps(record))
        describe.cache_clear()
        refused(finetune.get_config, str(run), next(iter(model)))
    with pytest.raises(InputError, match="neither a Hugging Face folder, nor a"):
        describe(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="needs a source"):
        describe("")


def test_the_command_refuses_a_source_in_one_line(folder, tmp_path):
    rewrite(folder / "config.json", logit_scale=2.0)
    arguments = [f"--config=configs/finetune.py:{folder}", f"--workdir={tmp_path / 'w'}"]
    environment = tiny.one_device()
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.strip()]
    assert "config.json: keys that are not known for its model_type: logit_scale=2.0" in line
    assert not (tmp_path / "w").exists()
