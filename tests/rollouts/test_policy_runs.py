"""Whole runs of a policy gradient: what they write, and that they go on as if never stopped."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import short_runs
import tiny_policy
from etils import epath

from lm.errors import InputError
from lm.runs.checkpoints import Checkpoints
from lm.training import experiment
from lm.training.reporting import TIMED

# Some answers have a letter in them and some do not.
REWARD = {"rollouts__rewards": "format", "rollouts__format__pattern": "(?s).*[a-z].*"}


def config(**overrides):
    given = {"optimizer__peak_learning_rate": 0.01, "train__seed": 1, **REWARD, **overrides}
    return tiny_policy.config(**given)


@pytest.mark.slow
def test_a_run_reports_what_it_draws_and_what_it_solves(tmp_path):
    c = config(evaluation__problems=5, evaluation__sample_tokens=4, train__steps=3)
    result, said = short_runs.train(c, tmp_path)
    assert result.finished
    for line in short_runs.lines(tmp_path, "train"):
        assert line["grad_norm"] > 0
        assert line["ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["kl_behaviour_k3"] == pytest.approx(0, abs=1e-5)
        assert 0 < line["reward"] < 1
        assert line["solved"] == pytest.approx(line["reward"])
        assert line["weight_sum"] == pytest.approx(16 * line["response_length"])
        assert not set(TIMED) & set(line)
    (line,) = short_runs.lines(tmp_path, "validation")
    assert line["problems"] == 5
    assert 0 <= line["solved"] == line["reward"] <= 1
    assert line["loss"] > 0  # That of the right answers.
    assert any(f", solved {line['solved']:.4f}" in one and "loss" in one for one in said)
    text = (tmp_path / "samples" / "step_3.txt").read_text()
    assert text.startswith("prompt: ")
    assert text.count("  reward ") == 16


@pytest.mark.slow
def test_temperatures_by_entropy_are_those_that_training_computes_with(tmp_path):
    """All ratios of a first step are 1; without the temperatures in the batch they are not."""
    tau = {"objective__name": "hapo", "objective__hapo__temperature_tau": 0.9}
    c = config(train__steps=4, **tau)
    short_runs.train(c, tmp_path / "run")
    for line in short_runs.lines(tmp_path / "run", "train"):
        assert line["ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["ratio_min"] == pytest.approx(1, abs=1e-4)
        assert line["kl_behaviour_k3"] == pytest.approx(0, abs=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["objectives.policy.policy"]
        patch.setattr(module, "tempered_by_token", module.tempered)
        short_runs.train(c, tmp_path / "constant")
    lines = short_runs.lines(tmp_path / "constant", "train")
    # The first rollout is drawn before any entropies are known.
    assert lines[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(line["ratio_max"] > 1.01 for line in lines[1:])


def final(c, workdir):
    data = experiment.load_data(c.data)
    built = experiment.build(c, data.tokenizer.vocab_size)
    with jax.set_mesh(built.mesh):
        kept = Checkpoints(epath.Path(workdir) / "checkpoints", print, read_only=True)
        state, _ = kept.restore(built.abstract_state())
        kept.close()
    return jax.device_get(state)


def same_end(c, *workdirs):
    one, other = (final(c, workdir) for workdir in workdirs)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    first, second = (short_runs.lines(workdir, "train") for workdir in workdirs)
    assert first == second
    return first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reuse", "dynamic", "stop", "name"),
    [(3, 0, 1, "grpo"), (4, 1, 3, "grpo"), (2, 0, 3, "hapo")],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, reuse, dynamic, stop, name):
    c = config(rollouts__reuse=reuse, rollouts__dynamic=dynamic, objective__name=name)
    short_runs.train(c, tmp_path / "whole")
    stopped, _ = short_runs.train(c, tmp_path / "cut", stop_after=stop)
    assert stop <= stopped.step < 6
    assert stopped.step % reuse
    short_runs.train(c, tmp_path / "cut")
    lines = same_end(c, tmp_path / "whole", tmp_path / "cut")
    assert [line["rollout_age"] for line in lines] == [step % reuse for step in range(6)]
    assert any(abs(line["kl_behaviour_k3"]) > 1e-6 for line in lines)
    drawn = [(lines[i]["reward"], lines[i]["entropy"]) for i in range(0, 6, reuse)]
    assert len(set(drawn)) == len(drawn)


# A run in a process of its own, with a checkpoint after every step.
RUN = """
import sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
import short_runs, test_policy_runs
c = test_policy_runs.config(rollouts__reuse=3, checkpoint__every_steps=1, train__steps=12)
short_runs.train(c, sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """SIGKILL within a rollout that is being trained on."""
    here = os.path.dirname(__file__)
    code = RUN.format(tests=os.path.dirname(here), here=here)

    def start(name):
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)])

    assert start("whole").wait(600) == 0
    process = start("cut")
    folder = tmp_path / "cut" / "checkpoints"
    while not any((folder / name).is_dir() for name in ("4", "5")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert start("cut").wait(600) == 0
    c = config(rollouts__reuse=3, checkpoint__every_steps=1, train__steps=12)
    assert len(same_end(c, tmp_path / "whole", tmp_path / "cut")) == 12


@pytest.mark.slow
def test_eight_devices_train_as_one_does(tmp_path):
    many = config(mesh__fsdp=8, train__steps=3)
    one = config(mesh__fsdp=1, mesh__data=1, train__steps=3)
    short_runs.train(many, tmp_path / "many")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        build = experiment.build
        first = jax.devices()[:1]
        patch.setattr(experiment, "build", lambda c, v, devices=None: build(c, v, first))
        short_runs.train(one, tmp_path / "one")
    lines = [short_runs.lines(tmp_path / name, "train") for name in ("many", "one")]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


TWO_PHASES = {
    "quantization__fraction": "0.5",
    "quantization__fused_cooldown": False,
    "quantization__warmup_steps": 1,
    "optimizer__warmup_steps": 1,
}
HALVES = {"train__accumulation": 2, "train__batch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"objective__name": "icepop", "rollouts__reuse": 2, "rollouts__bits": 4.0, **HALVES},
        {"objective__name": "policy", "objective__policy__old": "stored", **HALVES},
        {"objective__name": "tw_grpo", **HALVES},
        {"objective__name": "tw_grpo", "objective__tw_grpo__released": True, "mesh__fsdp": 8},
        {"objective__grpo__kl_coefficient": 0.1, "objective__references__reference_nll": "ema"},
        {"model__adapter_rank": 2, "objective__name": "dapo", "rollouts__top_p": 0.9},
        {"quantization__bits": 4.0, "rollouts__reuse": 3, **TWO_PHASES},
    ],
    ids=str,
)
def test_all_kinds_of_objectives_get_what_they_read(tmp_path, overrides):
    if "ema" in overrides.values():
        overrides = {**overrides, "train__ema_decay": 0.9}
    result, _ = short_runs.train(config(train__steps=4, **overrides), tmp_path)
    assert result.finished
    assert all(np.isfinite(line["loss"]) for line in short_runs.lines(tmp_path, "train"))


@pytest.mark.slow
def test_rewards_that_fail_cost_answers_and_not_the_run(tmp_path):
    """Sums have no numbers to count down from: a second reward that raises, each time."""
    c = config(rollouts__rewards="format,countdown", train__steps=3, train__max_skips=5)
    result, _ = short_runs.train(c, tmp_path)
    assert result.finished
    for line in short_runs.lines(tmp_path, "train"):
        assert line["failed_raised"] == 16
        assert line["skipped_in_a_row"] > 0  # There is nothing to train on.
        assert 0 < line["reward_format"] < 1


def test_text_without_problems_is_refused(tmp_path):
    lines = [f'{{"text": "abc {number}"}}' for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    texts = {"data__corpus": str(tmp_path / "texts.jsonl"), "data__validation_fraction": 0.4}
    with pytest.raises(InputError, match="has no problems to solve"):
        short_runs.train(config(**texts), tmp_path / "run")
    assert not (tmp_path / "run").exists()
