"""Runs of two phases: the switch, kills around it, a shared first phase, and packed weights."""

import functools

import jax
import numpy as np
import pytest
import tiny
from short_runs import final_state, lines, train
from test_phases import FUSED

from lm.compression.packed import read_packed
from lm.errors import InputError
from lm.evaluation import perplexity
from lm.model.trained import Trained
from lm.training import experiment


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny.config(
        data__corpus=corpus, evaluation__every_steps=2, train__ema_decay=0.9, **FUSED
    )
    result, said = train(config, folder)
    assert result.finished
    assert any("step 4: the quantized phase begins, 2 bits" in line for line in said)
    return config, folder


@pytest.mark.slow
def test_the_loss_jumps_at_the_switch(whole, tmp_path):
    """Against the same run in full precision: the same losses before, a higher one after."""
    config, folder = whole
    plain = config.copy_and_resolve_references()
    plain.quantization.bits = 16.0
    train(plain, tmp_path / "plain")
    losses, expected = (
        [line["loss"] for line in lines(f, "train")] for f in (folder, tmp_path / "plain")
    )
    # Two programs, since one has scales in its state: the last bit depends on the processor.
    np.testing.assert_allclose(losses[:4], expected[:4], rtol=1e-6)
    assert losses[4] > expected[4] + 0.01


@pytest.mark.slow
def test_both_losses_are_reported_in_both_phases(whole):
    _, folder = whole
    seen = {line["step"]: line for line in lines(folder, "validation")}
    for step, phase in ((2, "full_precision"), (4, "full_precision"), (6, "quantized")):
        assert seen[step]["loss"] == seen[step][f"{phase}_loss"]
        assert seen[step]["quantized_loss"] != seen[step]["full_precision_loss"]
    errors = seen[8]["quantization_error"]
    assert set(errors) == set(seen[8]["outside_clip_range"])
    assert len(errors["layers/mlp/up"]) == 2
    assert 0 < errors["layers/mlp/up"][0] < 1
    assert isinstance(errors["head/kernel"], float)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 6])
def test_a_run_cut_at_and_after_the_switch_is_the_whole_run(whole, tmp_path, stop_after):
    config, folder = whole
    stopped, _ = train(config, tmp_path / "cut", stop_after=stop_after)
    assert stopped.step == stop_after
    resumed, _ = train(config, tmp_path / "cut")
    assert resumed.finished
    for kind in ("train", "validation", "event"):
        assert lines(tmp_path / "cut", kind) == lines(folder, kind)
    (a, at), (b, bt) = (final_state(config, f) for f in (tmp_path / "cut", folder))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert at == bt


@pytest.mark.slow
def test_sixteen_bits_are_the_run_without_quantization(corpus, tmp_path):
    plain = tiny.config(data__corpus=corpus, train__steps=3)
    sixteen = tiny.config(data__corpus=corpus, train__steps=3, quantization__bits=16.0)
    sixteen.quantization.fraction = "0.5"
    for name, config in (("plain", plain), ("sixteen", sixteen)):
        train(config, tmp_path / name)
    (a, _), (b, _) = (
        final_state(plain, tmp_path / "plain"),
        final_state(sixteen, tmp_path / "sixteen"),
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert lines(tmp_path / "plain", "train") == lines(tmp_path / "sixteen", "train")


@pytest.mark.slow
def test_a_work_directory_keeps_its_quantization(whole):
    config, folder = whole
    other = config.copy_and_resolve_references()
    other.quantization.fraction = "0.4"
    with pytest.raises(InputError, match=r"quantization\.fraction"):
        train(other, folder)


@pytest.mark.slow
def test_packed_weights_and_post_training_losses_of_a_run(whole, corpus, tmp_path):
    """The file gives the run's last evaluation; at the switch the run says what it has to beat."""
    config, folder = whole
    found = read_packed(folder / "packed.safetensors")
    run = experiment.build(config, found.vocab_size)
    data = experiment.load_data(config.data)
    with jax.set_mesh(run.mesh):
        batches = experiment.evaluation_batches(config, data.validation, data.tokenizer)
        score = perplexity.evaluate(
            run.eval_step(plain=True), Trained(found.params), batches, run.mesh
        )
    last = lines(folder, "validation")[-1]
    np.testing.assert_allclose(score.loss, last["quantized_loss"], rtol=1e-6)
    assert abs(score.loss - last["full_precision_loss"]) > 1e-4  # negative control

    compared = config.copy_and_resolve_references()
    compared.quantization.update({"gptq_batches": 2, "from": ""})
    compared.train.steps, compared.quantization.fraction = 6, "0.34"
    compared.evaluation.batches = 0
    train(compared, tmp_path / "compared")
    (event,) = lines(tmp_path / "compared", "event")
    at_switch = next(x for x in lines(tmp_path / "compared", "validation") if x["step"] == 4)
    np.testing.assert_allclose(event["rtn"], at_switch["quantized_loss"], rtol=1e-6)
    assert np.isfinite(event["gptq"])
    assert event["gptq"] != event["rtn"]


@pytest.mark.slow
def test_runs_share_a_full_precision_phase(whole, corpus, tmp_path):
    """What one run would be that trains both phases, up to the last bits of two programs."""
    config, folder = whole
    first = config.copy_and_resolve_references()
    first.quantization.bits = 16.0
    first.checkpoint.update(every_steps=4, keep=5)
    train(first, tmp_path / "first")
    second = config.copy_and_resolve_references()
    second.quantization["from"] = str(tmp_path / "first")
    _, said = train(second, tmp_path / "second")
    assert f"starts with step 4 of {tmp_path / 'first'}" in said
    (a, at), (b, bt) = (final_state(config, f) for f in (tmp_path / "second", folder))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), a, b)
    assert at == bt
    losses = [line["loss"] for line in lines(folder, "train")]
    again = [line["loss"] for line in lines(tmp_path / "second", "train")]
    np.testing.assert_allclose(again, losses[4:], rtol=1e-6)

    for key, value, names in (
        ("model.width", 64, r"model\.width=32, not 64"),
        ("train.seed", 7, r"train\.seed=0, not 7"),
        ("train.steps", 12, "another learning rate|no checkpoint at step 6"),
        ("quantization.fraction", "0.375", "no checkpoint at step 5"),
        ("quantization.from", str(tmp_path), "holds no run"),
    ):
        other = second.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(InputError, match=names):
            train(other, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()

    # The parameters alone, for a run that is quantized from its first step on.
    tuned = second.copy_and_resolve_references()
    tuned.quantization.update(fraction="1", bits=4.0)
    tuned.train.update(steps=3, seed=3)
    _, said = train(tuned, tmp_path / "tuned")
    assert any(line.startswith("starts with the parameters of step 8") for line in said)
    begun = lines(tmp_path / "tuned", "train")[0]["loss"]
    assert begun < losses[0] - 0.3
