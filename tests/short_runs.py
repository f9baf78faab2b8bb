"""Runs of the loop in this process, and what they leave behind."""

import os
import signal

import jax
from etils import epath

from lm.runs.checkpoints import Checkpoints
from lm.training import experiment, loop
from lm.training.logging import read_metrics
from lm.training.reporting import TIMED


def train(config, workdir, stop_after=None):
    """Runs the loop; `stop_after` sends this process SIGTERM after that many reported steps."""
    said = []

    def say(line):
        said.append(line)
        if stop_after and line.startswith(f"step {stop_after}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    return loop.train(config, str(workdir), say), said


def lines(workdir, kind):
    """Lines of metrics.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k not in TIMED}
        for line in read_metrics(epath.Path(workdir))
        if line["kind"] == kind
    ]


def final_state(config, workdir):
    data = experiment.load_data(config.data)
    run = experiment.build(config, data.tokenizer.vocab_size)
    with jax.set_mesh(run.mesh):
        iterator = iter(experiment.train_batches(config, data))
        kept = Checkpoints(epath.Path(workdir) / "checkpoints", print, read_only=True)
        state, _ = kept.restore(run.abstract_state(), iterator)
        kept.close()
        position = iterator.get_state()
        iterator.close()
    return state, position
