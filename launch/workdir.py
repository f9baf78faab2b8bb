"""A trained model, from the folder of its run or from one packed file."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from launch import command
from lm.compression import packed
from lm.data import tokenizers
from lm.errors import InputError
from lm.model.trained import Trained
from lm.runs import run_record
from lm.training import experiment
from lm.training.state import TrainState, parameter_shapes


class Loaded(NamedTuple):
    """A run as `load` finds it.

    Attributes:
      config: of the run, its mesh being that of one device.
      run: the functions of the config.
      tokenizer: of the run.
      state: as it was saved; see `Experiment.usable` and `Experiment.plain`. Of a packed
        file, its parameters and no optimizer.
      step: of the checkpoint.
    """

    config: ConfigDict
    run: experiment.Experiment
    tokenizer: tokenizers.Tokenizer
    state: TrainState
    step: int


def load_chosen() -> Loaded:
    """The model that --workdir and --step name, or --packed.

    Raises:
      InputError: both, or as `load` and `load_packed`.
    """
    path = command.PACKED.value
    if path and (command.WORKDIR.value or command.STEP.value is not None):
        raise InputError("--packed=FILE is a whole model: leave --workdir and --step out")
    if path:
        return load_packed(path)
    return load(command.WORKDIR.value, command.STEP.value)


def load_packed(path: str) -> Loaded:
    """The model of a file of launch.quantize, its weights on their grids.

    Raises:
      InputError: no such file, a damaged one, or one of another model than its config says.
    """
    found = packed.read_packed(path)
    config = ConfigDict(found.config)
    if found.tokenizer:
        tokenizer = tokenizers.Subwords(found.tokenizer, path)
    else:
        tokenizer = tokenizers.load("bytes", 0, (), directory="")
    # The weights are on their grids already; activations are not.
    config.quantization.update(bits=16.0, fraction="1")
    run = _build(config, found.vocab_size)
    expected = parameter_shapes(run.model)
    if jax.tree.map(jnp.shape, found.params) != jax.tree.map(jnp.shape, expected):
        raise InputError(f"{path}: the parameters are not those of the config in it")
    trained = Trained(found.params)
    state = TrainState(found.step, trained, (), trained, (), 0, 0, 0.0)
    return Loaded(config, run, tokenizer, state, found.step)


def load(workdir: str | None, step: int | None = None, flag: str = "--workdir") -> Loaded:
    """The newest checkpoint of `workdir` (or that of `step`) on the devices at hand.

    Raises:
      InputError: no run, or no such checkpoint; the message names `flag`.
    """
    if not workdir:
        raise InputError(f"{flag}=FOLDER is missing: the folder of a trained run")
    record = run_record.read(workdir, flag)
    config = record.config
    definition = record.folder / "tokenizer.json"
    if definition.exists():
        tokenizer = tokenizers.Subwords(definition.read_text(), str(definition))
    else:
        tokenizer = tokenizers.load(config.data.tokenizer, 0, (), directory=config.data.directory)
    run = _build(config, record.vocab_size)
    state = run_record.restore(record, run, flag, command.say, step)
    return Loaded(config, run, tokenizer, state, int(state.step))


def _build(config: ConfigDict, vocab_size: int) -> experiment.Experiment:
    # The mesh of training need not be the mesh of today.
    config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
    return experiment.build(config, vocab_size, devices=jax.devices()[:1])
