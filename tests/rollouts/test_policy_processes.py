"""Policy gradients in several real processes: what one does alone, also after a kill."""

import signal

import numpy as np
import pytest
from processes import finish, lines, start, train, wait_for_step

POLICY = [
    "--config.objective.name=grpo",
    "--config.rollouts.group=4",
    "--config.rollouts.tokens=6",
    "--config.rollouts.reuse=4",
    "--config.rollouts.dynamic=1",
    "--config.rollouts.rewards=format",
    "--config.rollouts.format.pattern=(?s).*[a-z].*",
    "--config.train.steps=14",
    "--config.checkpoint.every_steps=1",
    "--config.evaluation.every_steps=7",
    "--config.evaluation.problems=11",
]
CORPUS = "task:sums/200"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    train(workdir, CORPUS, 2, *POLICY)
    return workdir


@pytest.mark.slow
def test_two_processes_draw_and_judge_what_one_does(together, tmp_path):
    train(tmp_path, CORPUS, 1, *POLICY, devices=2)
    for kind, names in (("train", ("reward", "response_length")), ("validation", ("reward",))):
        pairs = list(zip(*(lines(w, kind) for w in (together, tmp_path)), strict=True))
        assert len(pairs) == (14 if kind == "train" else 2)
        for a, b in pairs:
            assert a.keys() == b.keys()
            for name in names:
                assert a[name] == pytest.approx(b[name], rel=1e-6)
            if kind == "train":
                np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)


@pytest.mark.slow
def test_two_killed_processes_go_on_bit_for_bit(together, tmp_path):
    started = start(tmp_path, CORPUS, 2, *POLICY)
    wait_for_step(tmp_path, 6, started)
    for process in started:
        process.send_signal(signal.SIGKILL)
    finish(started)
    (_, _, said), _ = train(tmp_path, CORPUS, 2, *POLICY)
    assert "resumed at step" in said
    for kind in ("train", "validation"):
        assert lines(tmp_path, kind) == lines(together, kind)
