"""What the quantized phase begins with: the losses at its start are those of the weights put so."""

import numpy as np
import pytest
import tiny
from short_runs import lines, train

from launch import workdir
from lm.errors import InputError

BEGINNINGS = {"weights": "rtn", "search": "rtn", "gptq": "gptq", "rsq": "rsq", "unrounded": "gptq"}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """By beginning: the event of the switch, and the loss after a step that changes nothing."""
    folder, found = tmp_path_factory.mktemp("beginnings"), {}
    corpus = tiny.write_corpus(folder / "corpus")
    for name in BEGINNINGS:
        config = tiny.config(
            data__corpus=str(corpus),
            train__steps=1,
            optimizer__warmup_steps=0,
            optimizer__peak_learning_rate=1e-30,
            optimizer__schedule="constant",
            evaluation__batches=0,
            quantization__bits=3.0,
            quantization__fraction="1",
            quantization__gptq_batches=2,
            quantization__begin_with="gptq" if name == "unrounded" else name,
            quantization__begin_unrounded=name == "unrounded",
        )
        train(config, folder / name)
        (event,) = (e for e in lines(folder / name, "event") if e["event"] == "quantized")
        loaded = workdir.load(str(folder / name))
        weights = loaded.state.trained.params["layers"]["mlp"]["up"]
        found[name] = event, lines(folder / name, "validation")[-1]["loss"], np.asarray(weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_phase_begins_with_what_was_measured(losses, name):
    event, loss, _ = losses[name]
    np.testing.assert_allclose(loss, event[BEGINNINGS[name]], rtol=1e-5)


@pytest.mark.slow
def test_the_beginnings_differ(losses):
    found = [round(loss, 5) for _, loss, _ in losses.values()]
    assert len(set(found)) == len(BEGINNINGS) - 1


@pytest.mark.slow
def test_weights_that_were_not_rounded_have_the_same_codes_and_other_values(losses):
    (_, loss, rounded), (_, same, unrounded) = losses["gptq"], losses["unrounded"]
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    moved = np.abs(unrounded - rounded).mean() / np.abs(rounded).mean()
    assert 0.02 < moved < 0.5
    # GPTQ has changed them before it rounded them.
    assert np.abs(unrounded - losses["weights"][2]).mean() / np.abs(rounded).mean() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin_with": "gptq", "gptq_batches": 0}, "needs quantization.bits below 16 and"),
        ({"begin_with": "search", "begin_unrounded": True}, "needs quantization.begin_with='gptq'"),
        ({"begin_with": "gptk"}, "weights, search, gptq, rsq"),
        ({"begin_with": "search", "quantizer": "dense_shift"}, "dense_shift has no search"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_refuses(changes, message, tmp_path):
    config = tiny.config(quantization__bits=3.0, quantization__fraction="1")
    config.quantization.update(changes)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
