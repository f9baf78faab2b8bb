"""The logs of a run: metrics.jsonl, and what TensorBoard and Weights & Biases get."""

import json
import math
import shutil
import sys
import types

import pytest
import tiny
from etils import epath

from lm.runs import compatibility
from lm.runs.identity import run_id
from lm.studies import ablation, ablation_runs, outcomes
from lm.training import loop
from lm.training.logging import Writer, read_metrics


class FakeWandb(types.ModuleType):
    """Keeps the arguments of `init`, and merges logs by id, as the service does."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logs = [], {}

    def init(self, **arguments):
        self.calls.append(arguments)
        logged = self.logs.setdefault(arguments["id"], [])
        return types.SimpleNamespace(
            log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def strict_lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


VALUES = {"loss": math.nan, "grad_norm": math.inf, "weight_sum": 3.0}


def test_values_that_are_not_finite_are_null_and_named(tmp_path, wandb):
    config = tiny.config(train__wandb_project="p")
    writer = Writer(epath.Path(tmp_path), config, 0)
    writer.write(1, "train", VALUES)
    writer.close()
    expected = {
        "step": 1,
        "kind": "train",
        "loss": None,
        "grad_norm": None,
        "weight_sum": 3.0,
        "not_finite": {"loss": "nan", "grad_norm": "inf"},
    }
    assert strict_lines(tmp_path) == [expected]
    (line,) = read_metrics(epath.Path(tmp_path))
    assert repr(line) == repr({"step": 1, "kind": "train", **VALUES})
    # Weights & Biases gets the numbers themselves.
    ((_, logged),) = wandb.logs[None]
    assert math.isnan(logged["train/loss"])
    assert logged["train/grad_norm"] == math.inf

    Writer(epath.Path(tmp_path), config, 1).close()  # resumes, and writes the kept lines again
    assert strict_lines(tmp_path) == [expected]


def test_a_file_with_bare_nan_is_mended_when_the_run_resumes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": NaN}\n{"st')
    Writer(epath.Path(tmp_path), tiny.config(), 1).close()
    assert [line["not_finite"] for line in strict_lines(tmp_path)] == [{"loss": "nan"}]


def test_an_evaluation_that_is_not_finite_is_a_number_to_a_study(tmp_path):
    writer = Writer(epath.Path(tmp_path), tiny.config(), 0)
    writer.write(4, "train", VALUES | {"tokens": 9})
    writer.write(4, "validation", {"loss": math.nan, "bits_per_byte": math.nan, "whole": True})
    writer.close()
    found = outcomes.progress(tmp_path, 4)
    assert math.isnan(found.train_loss)
    assert math.isnan(found.result["loss"])
    assert math.isnan(found.curve[0][1])


def test_seeds_of_two_variants_are_two_runs_with_their_names_in_one_group(tmp_path, wandb):
    for variant in ("a", "b"):
        folder = epath.Path(tmp_path) / "codes" / variant / "seed_0"
        folder.mkdir(parents=True)
        config = tiny.config(train__wandb_project="p", train__wandb_group="codes")
        writer = Writer(folder, config, 0, run_id({}))
        writer.write(1, "train", {"loss": 1.5})
        writer.close()
    assert [call["name"] for call in wandb.calls] == ["a/seed_0", "b/seed_0"]
    assert {call["group"] for call in wandb.calls} == {"codes"}
    assert all(call["resume"] == "allow" for call in wandb.calls)
    assert len(wandb.logs) == 2
    assert all(len(logged) == 1 for logged in wandb.logs.values())


def test_an_ablation_groups_its_runs_without_changing_their_digests(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    from configs import ablation as form

    config = form.make(tiny.config(data__corpus=corpus), {"a": {}}, seeds=(0,), baseline="a")
    planned = ablation.make_plan(ablation.read(config), 1)
    (one,), (other,) = (ablation_runs.runs(planned, (0,), tmp_path / name) for name in ("x", "y"))
    assert (one.config.train.wandb_group, other.config.train.wandb_group) == ("x", "y")
    assert one.digest == other.digest


def test_a_run_keeps_its_id_and_an_old_run_gets_one(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(loop.Loop, "run", lambda self: None)  # Starts and resumes take no step.
    corpus = tiny.write_corpus(tmp_path / "corpus")
    run = tmp_path / "runs" / "one"

    def start():
        config = tiny.config(data__corpus=corpus, train__wandb_project="p")
        loop.train(config, str(run), lambda line: None)
        return json.loads((run / "config.json").read_text())

    record = start()
    assert len(record["run_id"]) == 16
    assert record["format"] == compatibility.FORMAT
    assert start()["run_id"] == record["run_id"]
    shutil.rmtree(run / "checkpoints")  # as if killed before the first
    assert start()["run_id"] == record["run_id"]
    old = {key: value for key, value in record.items() if key != "run_id"}
    (run / "config.json").write_text(json.dumps(old))  # as older commits wrote it
    again = start()["run_id"]
    assert again not in ("", record["run_id"])
    assert start()["run_id"] == again
    ids = [call["id"] for call in wandb.calls]
    assert ids == [record["run_id"]] * 3 + [again] * 2
    assert {call["name"] for call in wandb.calls} == {"runs/one"}
    assert {call["group"] for call in wandb.calls} == {None}
