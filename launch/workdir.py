"""A trained model, from the folder of its run."""

from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from launch import command
from lm.data import tokenizers
from lm.errors import InputError
from lm.training import experiment, runs
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


def load(workdir: str | None, step: int | None = None, flag: str = "--workdir") -> Loaded:
    """The newest checkpoint of `workdir` (or that of `step`) on the devices at hand.

    Raises:
      InputError: no run, or no such checkpoint; the message names `flag`.
    """
    if not workdir:
        raise InputError(f"{flag}=FOLDER is missing: the folder of a trained run")
    record = runs.read(workdir, flag)
    config = record.config
    # The mesh of training need not be the mesh of today.
    config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
    name = config.data.tokenizer
    if (record.folder / "tokenizer.json").exists():
        name = str(record.folder / "tokenizer.json")
    tokenizer = tokenizers.load(name, 0, (), directory=config.data.directory)
    run = experiment.build(config, record.vocab_size, devices=jax.devices()[:1])
    state = runs.restore(record, run, flag, command.say, step)
    return Loaded(config, run, tokenizer, state, int(state.step))
