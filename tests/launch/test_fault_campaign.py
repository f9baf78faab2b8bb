"""One training, killed again and again: nothing lost but what no checkpoint holds, nothing wrong.

Every life of the process is the same command. Half of the kills wait for a save to begin.
"""

import json
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from processes import lines, saved, start, train

from launch import workdir as workdirs
from lm.runs import integrity

pytestmark = pytest.mark.slow

STEPS, EVERY = 200, 4
ARGUMENTS = [
    f"--config.train.steps={STEPS}",
    "--config.evaluation.every_steps=12",
    "--config.evaluation.sample_tokens=0",
    "--stopped_code=75",
]
POLICY = [
    "--config.data.corpus=task:sums/200",
    "--config.objective.name=grpo",
    "--config.rollouts.group=4",
    "--config.rollouts.tokens=6",
    "--config.rollouts.reuse=3",  # Saves every 4 steps are also in the middle of rollouts.
    "--config.rollouts.dynamic=1",
    "--config.rollouts.rewards=format",
    "--config.rollouts.format.pattern=(?s).*[a-z].*",
    "--config.evaluation.problems=11",
]
# How a life ends: in the start-up, some time after its first step, some time after a save has
# begun, or by the notice of a preemption.
ENDS = ("saving",) * 5 + ("training",) * 4 + ("starting", "notice")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=["text", "policy"])
def further(request):
    """Arguments of a run on text, or of one that draws its batches itself."""
    return ARGUMENTS + (POLICY if request.param == "policy" else [])


@pytest.fixture(scope="module")
def whole(corpus, further, tmp_path_factory):
    """The run that nothing interrupts, with one checkpoint at its end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(workdir, corpus, 1, *further, "--config.checkpoint.every_steps=0")
    return workdir


class Life:
    """One process of the run, what it says, and the wait for something to happen to it."""

    def __init__(self, workdir, corpus, further, said):
        self.said, self.checkpoints = said, workdir / "checkpoints"
        arguments = [*further, f"--config.checkpoint.every_steps={EVERY}"]
        with said.open("w") as file:
            (self.process,) = start(workdir, corpus, 1, *arguments, stderr=file)

    def wait_for(self, happened):
        while not happened():
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.002)

    def steps(self):
        return self.said.read_text().count("\nstep ")

    def is_saving(self):
        return any("orbax-checkpoint-tmp" in path.name for path in self.checkpoints.iterdir())

    def end(self, number):
        self.process.send_signal(number)
        self.process.communicate(timeout=120)
        return self.process.returncode


def saved_by(workdir):
    """The newest step that is saved; 0 where none is."""
    return max(saved(workdir), default=0)


def check_written(workdir, whole):
    """What is written is a beginning of what the uninterrupted run has written, bit for bit."""
    for kind in ("train", "validation"):
        found = lines(workdir, kind)
        assert found == lines(whole, kind)[: len(found)]


def test_a_run_survives_kills_at_random_moments(corpus, further, whole, tmp_path):
    rng = random.Random(0)
    ends = rng.sample(ENDS, len(ENDS))
    workdir, in_saves, kills = tmp_path / "run", 0, 0
    newest = None
    for number, end in enumerate(ends):
        life = Life(workdir, corpus, further, tmp_path / f"life{number}")
        late = newest is not None and newest > STEPS // 2  # Hold back: it must not finish.
        saves = 0 if late else rng.randrange(4)  # or as many steps as between them
        if end == "starting":
            time.sleep(rng.uniform(0, 3))
        else:
            life.wait_for(life.steps)
            if newest is not None:
                assert f"resumed at step {newest}\n" in life.said.read_text(), (number, end)
        if end == "saving":
            reached = (newest or 0) + saves * EVERY
            life.wait_for(lambda reached=reached: saved_by(workdir) >= reached)
            life.wait_for(lambda life=life: not life.is_saving())  # Also not what a kill has left.
            life.wait_for(life.is_saving)
            time.sleep(rng.uniform(0, 0.04))
        elif end != "starting":
            life.wait_for(lambda life=life, n=saves * EVERY: life.steps() > n)
            time.sleep(rng.uniform(0, 0.1))
        if end == "notice":
            assert life.end(signal.SIGTERM) == 75
            assert f"stopped by a signal at step {saved(workdir)[-1]}; " in life.said.read_text()
        else:
            assert life.end(signal.SIGKILL) == -signal.SIGKILL, life.said.read_text()
            kills += 1
            in_saves += end == "saving" and life.is_saving()
        if not (workdir / "metrics.jsonl").exists():
            continue
        check_written(workdir, whole)
        steps = saved(workdir)
        assert newest is None or steps[-1] >= newest, "a whole checkpoint is gone"
        if steps:
            newest = steps[-1]
            assert integrity.damage(epath.Path(workdir) / "checkpoints" / str(newest)) == ""
            # No more is lost than the steps since the last save, and the save under way.
            assert lines(workdir, "train")[-1]["step"] <= newest + 3 * EVERY
    print(f"{kills} kills, {in_saves} of them in the middle of saving")
    assert kills == 10
    assert in_saves >= 2
    assert newest < STEPS
    ((*_, err),) = train(workdir, corpus, 1, *further, f"--config.checkpoint.every_steps={EVERY}")
    assert f"resumed at step {newest}\n" in err
    for kind in ("train", "validation"):
        assert lines(workdir, kind) == lines(whole, kind)
    assert [line["step"] for line in lines(workdir, "train")] == list(range(1, STEPS + 1))
    found, expected = (workdirs.load(str(run)) for run in (workdir, whole))
    assert found.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, found.state, expected.state)
    positions = [
        json.loads((Path(run) / f"checkpoints/{STEPS}/data/process_0-of-1.json").read_text())
        for run in (workdir, whole)
    ]
    assert positions[0] == positions[1]
