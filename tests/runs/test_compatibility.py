"""Work directories of commit e126dbc: they evaluate, generate, resume and quantize as they did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny
import tokenizers
from etils import epath

from configs import base
from launch import workdir
from lm import strict_json
from lm.data.tokenizers import Bytes, Subwords
from lm.evaluation import perplexity
from lm.evaluation.sampling import Sampler
from lm.runs import compatibility, run_record
from lm.training import experiment, loop, resume

ROOT = Path(__file__).parent.parent.parent
FIXTURES = "tests/fixtures/e126dbc"
EXPECTED = json.loads((ROOT / FIXTURES / "expected.json").read_text())
NAMES = ("plain", "quantized")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The fixtures in a folder of their own, in which their relative paths lead somewhere."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(ROOT / FIXTURES, folder / FIXTURES)
    before = Path.cwd()
    os.chdir(folder)
    yield folder / FIXTURES
    os.chdir(before)


def losses(loaded, split="validation"):
    data = experiment.load_data(loaded.config.data)
    batches = iter(
        experiment.evaluation_batches(loaded.config, getattr(data, split), data.tokenizer)
    )
    run = loaded.run
    with jax.set_mesh(run.mesh):
        trained, quantized = run.usable(loaded.state)
        return perplexity.evaluate(run.eval_step(), trained, batches, run.mesh, quantized=quantized)


@pytest.mark.parametrize("name", tiny.mostly_slow(NAMES, ("plain",)))
def test_it_evaluates_as_it_did(copy, name):
    found = losses(workdir.load(str(copy / name)))
    figures = EXPECTED[f"{name}_evaluate"]["figures"]
    assert found.loss == pytest.approx(figures["loss"], abs=2e-4)
    assert found.bits_per_byte == pytest.approx(figures["bits per byte"], abs=2e-4)


def test_its_packed_file_evaluates_as_it_did(copy):
    found = losses(workdir.load_packed(str(copy / "quantized" / "packed.safetensors")))
    figures = EXPECTED["packed_evaluate"]["figures"]
    assert found.loss == pytest.approx(figures["loss"], abs=2e-4)


@pytest.mark.parametrize("name", tiny.mostly_slow(NAMES, ("plain",)))
def test_it_generates_what_it_did(copy, name):
    loaded = workdir.load(str(copy / name))
    sampler = Sampler(loaded.run.model, loaded.tokenizer, temperature=0.0)
    with jax.set_mesh(loaded.run.mesh):
        text = sampler(loaded.run.plain(loaded.state), "alpha beta", 0, 24)
    assert text.rstrip("\n") == EXPECTED[f"{name}_generate_greedy"]["text"].rstrip("\n")


@pytest.mark.parametrize("name", tiny.mostly_slow(NAMES, ("quantized",)))
def test_it_resumes_as_it_did(copy, name, tmp_path):
    """From step 8 to step 12, the weighting's table and the optimizer's moments included."""
    shutil.copytree(copy / name, tmp_path / name)
    config = run_record.read(str(tmp_path / name), "--workdir").config
    fresh = base.get_config()
    fresh.update(config)
    fresh.train.steps = 12
    fresh.mesh.data = 1
    devices = jax.devices
    jax.devices = lambda *a: devices(*a)[:1]
    try:
        assert loop.train(fresh, str(tmp_path / name), lambda line: None).finished
    finally:
        jax.devices = devices
    lines = map(strict_json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    found = {(line["step"], line["kind"]): line for line in lines}
    for expected in EXPECTED[f"{name}_resume"]["metrics"]:
        line = found[expected["step"], expected["kind"]]
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        if "glow_seen" in expected:
            assert line["glow_seen"] == expected["glow_seen"]


@pytest.mark.slow
def test_it_quantizes_as_it_did(copy):
    environment = tiny.one_device(PYTHONPATH=ROOT)
    expected = EXPECTED["plain_quantize"]
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{expected['command']}", *expected["arguments"]],
        cwd=copy.parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in expected["stdout"]:
        if line.startswith("validation"):
            assert line in done.stdout


def test_an_older_run_keeps_the_ends_that_it_guessed(tmp_path):
    """The first known entry, special or not, opened and closed its documents."""
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    built.add_special_tokens(["<s>", "<eos>"])
    declared = Subwords(built.to_str(), "tokenizer.json")
    assert (declared.end_of_text_token, declared.beginning_of_text_token) == ("<eos>", "<s>")
    old = compatibility.upgrade_config({"data": {}})["data"]
    guessed = Subwords(
        built.to_str(), "tokenizer.json", old["end_of_text"], old["beginning_of_text"]
    )
    assert guessed.end_of_text == guessed.beginning_of_text == 1

    # A run whose guess is what is declared goes on; another one has to say which it means.
    (tmp_path / "config.json").write_text(strict_json.dumps({"config": {"data": {}}, "format": 1}))
    config = base.get_config()
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    plain.add_special_tokens(["</s>"])
    same = Subwords(plain.to_str(), "tokenizer.json")
    for tokenizer, end in ((same, "guessed"), (Bytes(), "guessed"), (declared, "<eos>")):
        settled = resume.settle_ends(config, tokenizer, epath.Path(tmp_path))
        assert settled.data.end_of_text == end
    nowhere = epath.Path(tmp_path / "none")
    assert resume.settle_ends(config, same, nowhere).data.end_of_text == "</s>"


def test_every_key_since_then_is_in_the_table():
    """A key that is forgotten there would be missing in every older work directory."""
    old = strict_json.loads((ROOT / FIXTURES / "plain" / "config.json").read_text())["config"]
    upgraded = compatibility.upgrade_config(old)

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    known, missing = set(flat(upgraded)), set(base.meanings()) - set(flat(upgraded))
    assert known <= set(base.meanings())
    # Methods that are newer than the run, which has no section of theirs and did not use them.
    sections = {tuple(key.split(".")[:2]) for key in missing}
    assert all(
        s in ("objective", "rollouts") and name not in old.get(s, {}) for s, name in sections
    )
    assert all(key.count(".") == 2 for key in missing)
    assert set(compatibility.ADDED) <= set(base.meanings())


def test_a_loss_with_another_name_is_mapped_with_its_hyper_parameters():
    old = {"objective": {"loss": "self_distillation", "self_distillation": {"share": 0.7}}}
    found = compatibility.upgrade_config(old)["objective"]
    assert (found["loss"], found["distillation"]) == ("distillation", {"share": 0.7})
    kept = compatibility.upgrade_config({"objective": {"loss": "dice"}})["objective"]
    assert kept["loss"] == "dice"


def test_a_renamed_key_is_mapped_and_a_newer_format_refused(monkeypatch):
    monkeypatch.setitem(compatibility.RENAMED, "model.depth", "model.layers")
    assert compatibility.upgrade_config({"model": {"depth": 3}})["model"]["layers"] == 3
    with pytest.raises(ValueError, match="format 99 is newer than 2"):
        compatibility.upgrade({"format": 99, "config": {}})
