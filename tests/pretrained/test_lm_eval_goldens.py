"""Tasks as lm_eval 0.4.13 evaluates them: prompts, choices, answers and standard errors.

Goldens are those of lm_eval_goldens/make_lm_eval_goldens.py, with a tiny model of transformers.
"""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from random_weights import golden, write_folder

from launch import harness
from lm.data.tokenizers import Bytes
from lm.errors import InputError
from lm.evaluation.tasks.encoding import Encoder
from lm.evaluation.tasks.evaluate import Machine, evaluate
from lm.evaluation.tasks.scoring import Scored
from lm.evaluation.tasks.task import LOGLIKELIHOOD, MULTIPLE_CHOICE, ROLLING, read_task

FOLDER = Path(__file__).parent / "lm_eval_goldens"
GOLDENS = json.loads((FOLDER / "goldens.json").read_text())
NAMES = sorted(GOLDENS)
LENGTH = 48  # of make_lm_eval_goldens


class Recorded(Encoder):
    """Encodes nothing: what is asked for is looked up in the goldens of a task."""

    def __init__(self, items):
        super().__init__(Bytes(), True, 10_000, 257)
        self.answers, self.contexts = {}, []
        for item in items:
            for arguments, (response,) in zip(item["arguments"], item["responses"], strict=True):
                key = tuple(arguments) if len(arguments) > 1 else arguments[0]
                if isinstance(response, str):
                    self.contexts.append(arguments[0])
                else:
                    self.answers[key] = response

    def pair(self, context, continuation):
        return self.answers[context, continuation]

    def windows(self, text, stride=0):
        return [(self.answers[text], False)]

    def is_cut(self, context, continuation):
        return False

    def prompt(self, text):
        assert text == self.contexts.pop(0)
        return np.zeros(1, np.int32)


def recorded_machine(items):
    def score(answers, greedy):
        return [Scored(np.array([float(ll)]), bool(best)) for ll, best in answers]

    written = [item["responses"][0][0] for item in items]
    return Machine(Recorded(items), score, lambda asked: written)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_metrics_are_those_of_lm_eval(name, monkeypatch):
    """The log-likelihoods and answers are taken from lm_eval, so that all else has to agree."""
    monkeypatch.chdir(FOLDER / "tasks")
    task, (results, items) = read_task(f"{name}.yaml"), GOLDENS[name].values()
    found = evaluate(task, recorded_machine(items))
    by_name = {figure.metric: figure for figure in found.figures}
    compared = 0
    for key, expected in results.items():
        metric, _, filtered = key.partition(",")
        error = metric.endswith("_stderr")
        metric = metric.removesuffix("_stderr")
        figure = by_name[metric if filtered == "none" else f"{metric},{filtered}"]
        if not error:
            assert figure.value == pytest.approx(expected, rel=1e-9), key
            compared += 1
        elif not isinstance(expected, str):
            assert figure.standard_error == pytest.approx(expected, rel=1e-9), key
    assert compared
    for index, (item, one) in enumerate(zip(found.items, items, strict=True)):
        assert item["index"] == index
        for filtered, metrics in one["metrics"].items():
            for metric, value in metrics.items():
                mine = metric if filtered == "none" else f"{metric},{filtered}"
                if isinstance(value, int | float) and mine in item:
                    assert item[mine] == value
        for filtered, (answer, *_) in one["filtered"].items():
            if f"filtered,{filtered}" in item:
                assert item[f"filtered,{filtered}"] == one["filtered"][filtered][0]
                assert isinstance(answer, str)


def test_another_prompt_would_be_seen(monkeypatch):
    monkeypatch.chdir(FOLDER / "tasks")
    task = read_task("fewshot_choices.yaml")._replace(fewshot_delimiter="\n\n")
    with pytest.raises(KeyError):
        evaluate(task, recorded_machine(GOLDENS["fewshot_choices"]["items"]))


@pytest.fixture(scope="module")
def nibble(tmp_path_factory):
    """The class that lm_eval gets, with the tiny model, on a stand-in for lm_eval."""
    api, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("registry")
    hook = types.SimpleNamespace(add_partial=lambda *arguments: None)
    api.LM = type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", hook)})
    registered = {}
    registry.register_model = lambda name: lambda made: registered.setdefault(name, made)
    config, shapes, *_ = golden("llama")
    folder = write_folder(tmp_path_factory.mktemp("hf") / "llama", config, shapes)
    stand_ins = {
        "lm_eval": types.ModuleType("lm_eval"),
        "lm_eval.api": types.ModuleType("lm_eval.api"),
        "lm_eval.api.model": api,
        "lm_eval.api.registry": registry,
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, stand_in in stand_ins.items():
            patch.setitem(sys.modules, module, stand_in)
        made = harness.register()
    assert registered == {"nibble": made}
    return made(model=str(folder), max_length=LENGTH, batch_size=4, device="cpu")


def requests(items):
    """The requests of all items, as lm_eval hands them over, and their recorded answers."""
    pairs = [
        (types.SimpleNamespace(args=tuple(arguments)), response)
        for item in items
        for arguments, (response,) in zip(item["arguments"], item["responses"], strict=True)
    ]
    return [list(column) for column in zip(*pairs, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_answers_as_lm_evals_own_hf(name, nibble, monkeypatch):
    monkeypatch.chdir(FOLDER / "tasks")
    kind = read_task(f"{name}.yaml").output_type
    asked, expected = requests(GOLDENS[name]["items"])
    if kind in (MULTIPLE_CHOICE, LOGLIKELIHOOD):
        found = nibble.loglikelihood(asked)
        assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]
        np.testing.assert_allclose(
            [ll for ll, _ in found], [float(ll) for ll, _ in expected], rtol=1e-4
        )
    elif kind == ROLLING:
        found = nibble.loglikelihood_rolling(asked)
        np.testing.assert_allclose(found, np.array(expected, float).ravel(), rtol=1e-4)
    else:
        assert nibble.generate_until(asked) == expected


def test_prompts_that_open_with_the_end_of_text_would_be_seen(nibble):
    asked, expected = requests(GOLDENS["fewshot_choices"]["items"][:2])
    backend = nibble._backend
    plain, opened = backend.encoder, Encoder(backend.encoder.tokenizer, True, LENGTH, 67)
    assert len(opened.pair("AB", "C").tokens) == len(plain.pair("AB", "C").tokens) + 1
    backend.encoder = opened
    found = nibble.loglikelihood(asked)
    backend.encoder = plain
    gaps = [abs(a - float(b)) for (a, _), (b, _) in zip(found, expected, strict=True)]
    assert max(gaps) > 1e-2
    assert all(map(math.isfinite, gaps))


def test_the_adapter_refuses_draws_and_a_missing_lm_eval(nibble, monkeypatch):
    sampled = types.SimpleNamespace(args=("A", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(InputError, match="answers greedily"):
        nibble.generate_until([sampled])
    long = types.SimpleNamespace(args=("A", {"until": ["\n"]}))
    with pytest.raises(InputError, match="max_gen_toks=256 leaves no room"):
        nibble.generate_until([long])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'nibble-lm\[eval\]'"):
        harness.register()
