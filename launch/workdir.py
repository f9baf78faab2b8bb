"""A trained model, from the folder of its run."""

import json
from typing import NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from launch import command
from lm.data import tokenizers
from lm.errors import InputError
from lm.training import experiment
from lm.training.checkpoints import Checkpoints
from lm.training.state import TrainState


class Loaded(NamedTuple):
    """A run as `load` finds it.

    Attributes:
      config: of the run, its mesh being that of one device.
      run: the functions of the config.
      tokenizer: of the run.
      state: as it was saved; see `Experiment.usable` and `Experiment.plain`.
      step: of the checkpoint.
    """

    config: ConfigDict
    run: experiment.Experiment
    tokenizer: tokenizers.Tokenizer
    state: TrainState
    step: int


def load(workdir: str | None, step: int | None = None) -> Loaded:
    """The newest checkpoint of `workdir` (or that of `step`) on the devices at hand.

    Raises:
      InputError: no run, or no such checkpoint.
    """
    if not workdir:
        raise InputError("--workdir=FOLDER is missing: the folder of a trained run")
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        raise InputError(f"--workdir={workdir} holds no run: there is no config.json in it")
    record = json.loads((folder / "config.json").read_text())
    config = ConfigDict(record["config"])
    # The mesh of training need not be the mesh of today.
    config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
    name = config.data.tokenizer
    if (folder / "tokenizer.json").exists():
        name = str(folder / "tokenizer.json")
    tokenizer = tokenizers.load(name, 0, (), directory=config.data.directory)
    run = experiment.build(config, record["vocab_size"], devices=jax.devices()[:1])
    checkpoints = Checkpoints(folder / "checkpoints", command.say, read_only=True)
    restored = checkpoints.restore(run.abstract_state(), step=step)
    checkpoints.close()
    if restored is None:
        raise InputError(f"--workdir={workdir} holds no checkpoint yet")
    state, _ = restored
    return Loaded(config, run, tokenizer, state, int(state.step))
