"""Reading a model takes its parameters alone, on any mesh."""

import jax
import numpy as np
import pytest
import tiny
from short_runs import train

from launch import command, workdir
from lm.compression import packed
from lm.compression.phases import default_rules
from lm.runs import run_record
from lm.training import experiment
from objectives.quantization import absmax


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, folder) of a run with moments and an average."""
    folder = tmp_path_factory.mktemp("run")
    corpus = tiny.write_corpus(folder / "corpus")
    config = tiny.config(data__corpus=corpus, train__steps=2, optimizer__warmup_steps=1)
    config.model.layers = 1
    config.train.ema_decay = 0.9
    train(config, folder / "w")
    return config, folder / "w"


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def test_only_the_average_is_read_and_it_is_that_of_the_whole_state(run):
    config, folder = run
    loaded = workdir.load(str(folder))
    built = experiment.build(config, loaded.run.model.config.vocab_size, jax.devices()[:1])
    record = run_record.read(str(folder), "--workdir")
    whole = run_record.restore(record, built.abstract_state(), "--workdir", lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, loaded.state.ema, whole.ema)
    assert loaded.step == int(whole.step) == 2
    assert loaded.state.trained is None
    assert loaded.state.optimizer is None
    # Parameters, average and two moments: a quarter, but for counters.
    assert bytes_of(loaded.state) < 0.26 * bytes_of(whole)


def test_a_mesh_of_eight_devices_has_a_part_of_it_on_each(run, monkeypatch):
    _, folder = run
    one = workdir.load(str(folder))
    monkeypatch.setattr(command, "_mesh", {"fsdp": 4, "tensor": 2})
    eight = workdir.load(str(folder))
    assert dict(eight.run.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    leaf = eight.state.ema.params["layers"]["mlp"]["up"]
    assert len(leaf.sharding.device_set) == 8
    assert leaf.addressable_shards[0].data.size == leaf.size // 8
    jax.tree.map(np.testing.assert_array_equal, eight.state.ema, one.state.ema)


def test_the_mesh_is_taken_from_the_command_line(monkeypatch):
    monkeypatch.setattr(command, "_mesh", {})
    arguments = ["launch.evaluate", "--workdir=runs/x", "--config.mesh.fsdp=4"]
    monkeypatch.setattr("sys.argv", list(arguments))
    command._take_mesh(arguments)
    assert arguments == ["launch.evaluate", "--workdir=runs/x"]
    assert command.mesh() == {"fsdp": 4}


def test_other_quantizers_and_activations_are_read_from_a_packed_file(run, tmp_path):
    """Weights are on their grids in the file; activations are rounded as in training."""
    config, folder = run
    loaded = workdir.load(str(folder))
    config = config.copy_and_resolve_references()
    config.quantization.update(bits=4.0, quantizer="absmax", activations="int8", fraction="1.0")
    config.train.ema_decay = 0.0
    params = loaded.run.usable(loaded.state)[0].params
    rules = default_rules(4, absmax)
    scales = jax.tree.map(lambda x: (), params)
    size = packed.write_packed(
        tmp_path / "x.safetensors",
        packed.code_leaves(params, scales, rules),
        config=config.to_dict(),
        vocab_size=loaded.run.model.config.vocab_size,
        tokenizer="",
        step=2,
    )
    assert size > 0
    found = workdir.load_packed(str(tmp_path / "x.safetensors"))
    trained, quantized = found.run.usable(found.state)
    assert quantized
    batch = tiny.batch(rows=2)
    with jax.set_mesh(found.run.mesh):
        sums = found.run.eval_step()(trained, batch)
    assert np.isfinite(sums["nll"])
    # Negative control: without rounding of activations it is another loss.
    assert sums["nll"] != sums["quantized_nll"]
