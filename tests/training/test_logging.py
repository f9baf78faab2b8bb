"""What a run writes down: strict JSON, and an id of its own in Weights & Biases."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import tiny
from etils import epath
from short_runs import lines, train

from lm import strict_json
from lm.training.logging import Writer, read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def strict(text):
    """Parses JSON as RFC 8259 has it."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_and_come_back():
    value = {"loss": math.nan, "a": {"b/c.d": [1.0, math.inf, -math.inf]}, "step": 3, "t": (2,)}
    text = strict_json.dumps(value)
    assert strict(text) == {
        "loss": None,
        "a": {"b/c.d": [1.0, None, None]},
        "step": 3,
        "t": [2],
        "not_finite": {"loss": "nan", "a": {"b/c.d": {"1": "inf", "2": "-inf"}}},
    }
    back = strict_json.loads(text)
    assert math.isnan(back.pop("loss"))
    assert back == {"a": {"b/c.d": [1.0, math.inf, -math.inf]}, "step": 3, "t": [2]}
    assert strict_json.dumps({"a": 1.5}) == json.dumps({"a": 1.5})
    assert math.isnan(strict_json.loads('{"loss": NaN}')["loss"])
    with pytest.raises(ValueError, match="only an object"):
        strict_json.dumps([math.nan])


def test_no_other_json_is_written():
    root = Path(__file__).parent.parent.parent
    sources = [p for top in ("lm", "launch") for p in (root / top).rglob("*.py")]
    for path in sources:
        if path.name != "strict_json.py":
            text = path.read_text().replace("strict_json.dump", "")
            assert "json.dump" not in text, path


def test_a_run_whose_gradients_are_not_finite_writes_strict_json(corpus, tmp_path):
    config = tiny.config(
        data__corpus=corpus, train__steps=2, optimizer__warmup_steps=0, train__max_skips=9
    )
    config.objective.z_loss = 1e38
    config.objective.dynamic.temperature = math.inf
    config.model.layers = 1
    train(config, tmp_path)
    written = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("grad_norm" in line.get("not_finite", {}) for line in written)
    assert not any(math.isfinite(line["grad_norm"]) for line in lines(tmp_path, "train"))
    strict((tmp_path / "config.json").read_text())
    # The recorded infinity is the same config: the finished run is left as it is.
    assert train(config, tmp_path)[0].finished


def test_runs_have_ids_of_their_own_which_resuming_keeps(corpus, tmp_path, monkeypatch):
    started = []
    fake = types.SimpleNamespace(
        init=lambda **options: (
            started.append(options)
            or types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny.config(
        data__corpus=corpus, train__steps=2, optimizer__warmup_steps=1, model__layers=1
    )
    config.train.wandb_project = "toy"
    for variant in ("a", "b", "b"):
        config.train.steps += 1
        train(config, tmp_path / variant / "seed_0")
    ids = [options["id"] for options in started]
    assert ids[1] == ids[2] != ids[0]
    assert [options["name"] for options in started] == ["a/seed_0", "b/seed_0", "b/seed_0"]
    record = json.loads((tmp_path / "b" / "seed_0" / "config.json").read_text())
    assert record["run_id"] == ids[1]


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    config = tiny.config()
    folder = epath.Path(tmp_path)
    writer = Writer(folder, config, 0, "id")
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": math.nan if step == 2 else 1.0})
    writer.close()
    Writer(folder, config, 2, "id").close()
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    assert math.isnan(read_metrics(folder)[1]["loss"])
