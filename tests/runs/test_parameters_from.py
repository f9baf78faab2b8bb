"""A run that begins with the parameters of another model: of a run, or of a folder of others."""

import shutil

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from pretrained.random_weights import golden, tensor, write_folder
from safetensors import safe_open
from safetensors.numpy import save_file
from short_runs import final_state, lines, train

from configs import finetune
from launch import workdir
from lm.errors import InputError


def write_tokenizer(folder, more=(), swapped=False):
    """Bytes, an end of text and `more`; a list of ids of its own if `swapped`."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[::-1] if swapped else alphabet
    built = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["</s>", *more])
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beginnings")
    tiny.write_corpus(folder / "corpus")
    write_tokenizer(folder / "plain")
    write_tokenizer(folder / "larger", ("<user>", "<bot>"))
    write_tokenizer(folder / "swapped", swapped=True)
    return folder


def config(root, tokenizer="plain", **overrides):
    c = tiny.config(
        data__corpus=str(root / "corpus"),
        data__tokenizer=str(root / tokenizer / "tokenizer.json"),
        model__layers=1,
        train__steps=2,
        optimizer__warmup_steps=1,
        checkpoint__every_steps=2,
    )
    for name, value in overrides.items():
        section, key = name.split("__")
        c[section][key] = value
    return c


@pytest.fixture(scope="module")
def source(root):
    """A finished run and its average, which is what others read."""
    train(config(root, train__ema_decay=0.5), root / "source")
    loaded = workdir.load(str(root / "source"), fields=("trained",))
    up, average = (
        x.params["layers"]["mlp"]["up"] for x in (loaded.state.trained, loaded.state.ema)
    )
    assert np.abs(up - average).max() > 1e-5
    return root / "source", jax.device_get(loaded.run.usable(loaded.state)[0].params)


def untrained(c, folder):
    """Parameters of a run whose rate changes no float32: those that it has begun with."""
    c.optimizer.update(peak_learning_rate=1e-30, weight_decay=0.0)
    _, said = train(c, folder)
    loaded = workdir.load(str(folder))
    return jax.device_get(loaded.run.usable(loaded.state)[0].params), said


def test_a_run_begins_with_the_average_of_another_one(root, source):
    """Another length, optimizer, objective and a larger vocabulary in one run."""
    folder, old = source
    c = config(root, "larger", data__sequence_length=16, initialise__from=str(folder))
    c.optimizer.name, c.objective.loss = "lion", "inverted_hinge"
    new, said = untrained(c, root / "begun")
    assert f"starts with the parameters of {folder}" in said
    table, grown = old["embedding"].pop("table"), new["embedding"].pop("table")
    kernel, wider = old["head"].pop("kernel"), new["head"].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, new, old)
    assert (grown.shape, wider.shape) == ((259, 32), (32, 259))
    np.testing.assert_array_equal(grown[:257], table)
    np.testing.assert_array_equal(wider[:, :257], kernel)
    np.testing.assert_allclose(grown[257:], np.tile(table.mean(0), (2, 1)), atol=1e-7)
    np.testing.assert_allclose(wider[:, 257:], np.tile(kernel.mean(1)[:, None], 2), atol=1e-7)
    old["embedding"]["table"], old["head"]["kernel"] = table, kernel


def refusal(c, folder):
    with pytest.raises(InputError) as caught:
        train(c, folder)
    assert str(caught.value).isprintable()
    assert not (folder / "checkpoints").exists() or not any((folder / "checkpoints").iterdir())
    return str(caught.value)


def test_another_architecture_or_tokenizer_is_refused_by_name(root, source, tmp_path):
    folder, _ = source
    base = {"initialise__from": str(folder)}
    line = refusal(config(root, **base, model__mlp_width=96), tmp_path / "a")
    assert f"initialise.from={folder} has model.mlp_width=64, not 96" in line
    line = refusal(config(root, "swapped", **base), tmp_path / "b")
    assert f"initialise.from={folder} has another tokenizer than data.tokenizer: 256 of its" in line
    both = config(root, **base, quantization__from=str(folder))
    both.quantization.update(bits=4.0, fraction="1.0")
    assert "initialise.from and quantization.from are two beginnings" in refusal(
        both, tmp_path / "c"
    )
    line = refusal(config(root, initialise__from=str(tmp_path / "no")), tmp_path / "d")
    assert "/no holds no run" in line
    # The attention's kernel is a matter of the machine: this gets as far as to the tokenizer.
    line = refusal(config(root, "swapped", **base, model__attention="xla"), tmp_path / "e")
    assert "another tokenizer" in line


def test_a_vocabulary_smaller_than_that_of_the_run_is_refused(root, source, tmp_path):
    line = refusal(
        config(root, "plain", initialise__from=str(write_larger(root))), tmp_path / "run"
    )
    assert (
        "has a vocabulary of 259, more than the 257 of this run; give data.vocab_size=259" in line
    )


def write_larger(root):
    """A copy of the finished run that says it has two tokens more."""
    folder = root / "larger_run"
    if not folder.exists():
        shutil.copytree(root / "source", folder)
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 259'))
        assert '"vocab_size": 259' in path.read_text()
    return folder


@pytest.fixture
def folder(root, tmp_path, monkeypatch):
    """A Hugging Face folder of a tiny Mistral with the tokenizer of bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings, shapes, _, _ = golden("mistral")
    shapes = {n: [257, s[1]] if s[0] == 67 else s for n, s in shapes.items()}
    folder = write_folder(tmp_path / "model", settings | {"vocab_size": 257}, shapes)
    write_tokenizer(folder)
    return folder


def fine_tuning(root, folder):
    c = finetune.get_config(str(folder))
    small = tiny.config()
    for section in ("train", "checkpoint", "evaluation", "mesh", "quantization"):
        c[section].update(small[section])
    c.data.update(corpus=str(root / "corpus"), sequence_length=16, shuffle_rows=8)
    c.data.validation_fraction = 0.3
    c.train.update(steps=4, batch_size=8)
    c.checkpoint.every_steps = 2
    c.optimizer.update(peak_learning_rate=1e-3, warmup_steps=1)
    return c


@pytest.mark.slow
def test_a_run_from_a_folder_resumes_bit_identically_when_the_folder_is_gone(
    root, folder, tmp_path
):
    c = fine_tuning(root, folder)
    _, said = train(c, tmp_path / "straight")
    assert f"starts with the parameters of {folder}" in said
    train(c, tmp_path / "stopped", stop_after=2)
    shutil.rmtree(folder)
    refused = refusal(c, tmp_path / "fresh")  # Negative control: it is needed at the beginning.
    assert str(folder) in refused
    _, said = train(c, tmp_path / "stopped")
    assert "resumed at step 2" in said
    (one, place), (other, same_place) = (
        final_state(c, tmp_path / name) for name in ("straight", "stopped")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert place == same_place
    assert lines(tmp_path / "straight", "train") == lines(tmp_path / "stopped", "train")


@pytest.mark.slow
def test_a_model_from_a_folder_is_its_own_teacher_on_grids(root, folder, tmp_path):
    """In full precision there is nothing to learn; on grids there is, and of another model."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    name = "model.layers.1.mlp.up_proj.weight"
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {name: 2 * tensors[name]}, other / "model.safetensors")
    first = {}
    for case, teacher, bits in (("same", folder, 16), ("grid", folder, 3), ("other", other, 16)):
        c = fine_tuning(root, folder)
        c.train.steps = 2
        c.objective.loss = "distillation"
        c.objective.references.teacher = str(teacher)
        c.quantization.update(bits=float(bits), fraction="1")
        if bits < 16:  # None of it is of the teacher.
            c.quantization.update(cache="int8", begin_with="gptq", gptq_batches=1)
        train(c, tmp_path / f"run_{case}")
        first[case] = lines(tmp_path / f"run_{case}", "train")[0]["loss"]
    assert abs(first["same"]) < 1e-6
    assert first["grid"] > 1e-3
    assert first["other"] > 1e-3
    c.objective.references.teacher = str(root / "nothing")
    assert "a Hugging Face folder, a .gguf file" in refusal(c, tmp_path / "none")


def test_a_run_from_a_folder_begins_with_its_weights_and_grows_its_table(root, folder, tmp_path):
    c = fine_tuning(root, folder)
    c.train.steps = 2
    c.data.update(tokenizer=str(root / "larger" / "tokenizer.json"), vocab_size=0)
    params, _ = untrained(c, tmp_path / "run")
    name = "model.layers.1.mlp.up_proj.weight"
    up = params["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(up[1], tensor(name, up.shape[:0:-1]).T)
    table = tensor("model.embed_tokens.weight", (257, 32))
    np.testing.assert_array_equal(params["embedding"]["table"][:257], table)
    np.testing.assert_allclose(params["embedding"]["table"][258], table.mean(0), atol=1e-6)
    c.data.update(tokenizer=str(root / "swapped" / "tokenizer.json"))
    assert "has another tokenizer" in refusal(c, tmp_path / "other")
    c.model.rope_base = 5.0
    assert "has model.rope_base=10000.0, not 5.0" in refusal(c, tmp_path / "another")


def test_the_config_of_a_fine_tuning_takes_a_run_too(root, source):
    folder, _ = source
    c = finetune.get_config(str(folder))
    assert (c.model.mlp_width, c.data.vocab_size, c.initialise.family) == (64, 257, "")
    assert c.data.tokenizer == str(folder / "tokenizer.json")
    assert c.data.end_of_text == "</s>"


@pytest.mark.slow
def test_adapters_on_codes_go_on_as_they_are_or_are_merged(root, source):
    """A run with adapters on a packed base, and two that begin with it: with and without them."""
    folder, old = source
    c = config(
        root,
        initialise__from=str(folder),
        model__adapter_rank=2,
        optimizer__peak_learning_rate=0.05,
    )
    c.train.frozen = "int8"
    _, said = train(c, root / "adapted")
    assert any("of them trained" in line for line in said)
    adapted = workdir.load(str(root / "adapted"))
    merged = jax.device_get(workdir.merged(adapted).state.trained.params)
    up, before = merged["layers"]["mlp"]["up"], old["layers"]["mlp"]["up"]
    assert np.abs(up - before).max() > 1e-3
    start = {"initialise__from": str(root / "adapted")}
    plain, _ = untrained(config(root, **start), root / "merged")
    np.testing.assert_allclose(plain["layers"]["mlp"]["up"], up, atol=1e-6)
    further, _ = untrained(config(root, **start, model__adapter_rank=2), root / "further")
    for name in ("up_adapter_in", "up_adapter_out"):
        expected = adapted.state.trained.params["layers"]["mlp"][name]
        np.testing.assert_array_equal(further["layers"]["mlp"][name], expected)
