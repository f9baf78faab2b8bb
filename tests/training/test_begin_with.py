"""What the quantized phase begins with: the losses at its start are those of the weights put so."""

import numpy as np
import pytest
import tiny
from short_runs import lines, train

from lm.errors import InputError

BEGINNINGS = {"weights": "rtn", "search": "rtn", "gptq": "gptq", "rsq": "rsq"}


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
            quantization__begin_with=name,
        )
        train(config, folder / name)
        (event,) = (e for e in lines(folder / name, "event") if e["event"] == "quantized")
        found[name] = event, lines(folder / name, "validation")[-1]["loss"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_phase_begins_with_what_was_measured(losses, name):
    event, loss = losses[name]
    np.testing.assert_allclose(loss, event[BEGINNINGS[name]], rtol=1e-5)


@pytest.mark.slow
def test_the_beginnings_differ(losses):
    assert len({round(loss, 5) for _, loss in losses.values()}) == len(BEGINNINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin_with": "gptq", "gptq_batches": 0}, "needs quantization.bits below 16 and"),
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
