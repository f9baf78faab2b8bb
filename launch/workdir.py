"""A trained model: from the folder of its run, a packed file, or the files of others."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import finetune
from launch import command
from lm.compression import after_training, packed
from lm.compression.cache import KEYS
from lm.data import tokenizers
from lm.errors import InputError
from lm.model import adapters
from lm.model.trained import Trained
from lm.pretrained.load import load_params
from lm.pretrained.source import is_pretrained, open_pretrained
from lm.references.sources import BASE
from lm.runs import compatibility, run_record
from lm.training import experiment
from lm.training.state import TrainState


class Loaded(NamedTuple):
    """A run as `load` finds it.

    Attributes:
      config: of the run, its mesh being that of --config.mesh.*, one device by default.
      run: the functions of the config.
      tokenizer: of the run.
      state: what was read of it, other fields are None; see `Experiment.usable` and
        `Experiment.plain`.
      step: of the checkpoint.
      coded: path -> codes and grid of what a packed file holds quantized.
    """

    config: ConfigDict
    run: experiment.Experiment
    tokenizer: tokenizers.Tokenizer
    state: TrainState
    step: int
    coded: Mapping[str, packed.Coded] = MappingProxyType({})


def load_chosen(fields: Sequence[str] = ()) -> Loaded:
    """The model that --model names, or --workdir or --packed; --step chooses its checkpoint.

    Of a run `fields` of the train state are restored besides its parameters.

    Raises:
      InputError: none of the flags or several, no such model, or a --step for one without steps.
    """
    given = {
        f"--{flag.name}": flag.value
        for flag in (command.MODEL, command.WORKDIR, command.PACKED)
        if flag.value
    }
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given)} are several models: give one of them"
            if given
            else "--model=M is missing: a work directory, a packed file, a Hugging Face folder or "
            "a .gguf file"
        )
    ((flag, path),) = given.items()
    return load_any(path, command.STEP.value, flag, fields)


def load_any(
    path: str, step: int | None = None, flag: str = "--model", fields: Sequence[str] = ()
) -> Loaded:
    """The model of a work directory, a packed file, a Hugging Face folder or a .gguf file.

    Raises:
      InputError: no such model, or a step of one without steps; the message names `flag`.
    """
    if is_pretrained(path):
        read = load_pretrained
    elif flag == "--packed" or path.endswith(".safetensors") or Path(path).is_file():
        read = load_packed
    else:
        return load(path, step, flag, fields)
    if step is not None:
        raise InputError(f"{flag}={path} is a whole model: leave --step out")
    return read(path)


def load_pretrained(path: str) -> Loaded:
    """The model of a Hugging Face folder or a .gguf file, on the mesh of --config.mesh.*.

    Raises:
      InputError: damaged, or of a family that is not known.
    """
    found = open_pretrained(path)
    config = finetune.get_config(path, found)
    run = _build(config, found.vocab_size)
    trained = Trained(load_params(found, run.model, run.mesh))
    state = TrainState(0, trained, (), trained, (), 0, 0, 0.0)
    return Loaded(config, run, found.tokenizer, state, 0)


def load_packed(path: str) -> Loaded:
    """The model of a file of launch.quantize, its weights on their grids.

    Raises:
      InputError: no such file, a damaged one, or one of another model than its config says.
    """
    found = packed.read_packed(path)
    config = ConfigDict(compatibility.upgrade_config(found.config))
    if found.tokenizer:
        tokenizer = tokenizers.Subwords(found.tokenizer, path, *_ends(config))
        tokenizer.chat_template = found.chat_template or tokenizer.chat_template
    else:
        tokenizer = tokenizers.load("bytes", 0, (), directory="")
    # The weights are on their grids already; activations, keys and values are not.
    config.quantization.update(bits=16.0, widths="", adapt_every=0, fraction="1")
    run = _build(config, found.vocab_size)
    # A file has no first phase, not even that of a model that was never trained here: step 0.
    run = run._replace(phases=run.phases._replace(switch=-1))
    abstract = run.abstract_state().trained
    shapes = jax.tree.map(jnp.shape, abstract.params)
    if jax.tree.map(jnp.shape, found.params) != shapes:
        raise InputError(f"{path}: the parameters are not those of the config in it")
    trained = Trained(found.params, _scales(path, config, abstract.scales, found.key_scales))
    state = TrainState(found.step, trained, (), trained, (), 0, 0, 0.0)
    return Loaded(config, run, tokenizer, state, found.step, found.coded)


def _scales(path: str, config: ConfigDict, abstract: Any, key_scales: Any) -> Any:
    """The scales of a model whose parameters are on their grids: those of its cache, if any."""
    scales = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    wanted = abstract[KEYS].shape if KEYS in abstract else None
    if wanted != (None if key_scales is None else key_scales.shape):
        raise InputError(
            f"{path}: the scales of keys in it do not fit quantization.cache="
            f"{config.quantization.cache} of its config"
        )
    return scales if wanted is None else {**scales, KEYS: key_scales}


def load(
    workdir: str,
    step: int | None = None,
    flag: str = "--model",
    fields: Sequence[str] = (),
) -> Loaded:
    """The newest checkpoint of `workdir` (or that of `step`), on the mesh of --config.mesh.*.

    Of the train state only what a model is read from is restored, and besides it `fields`.

    Raises:
      InputError: no run, or no such checkpoint; the message names `flag`.
    """
    record = run_record.read(workdir, flag)
    config = record.config
    definition = record.folder / "tokenizer.json"
    if definition.exists():
        tokenizer = tokenizers.Subwords(definition.read_text(), str(definition), *_ends(config))
    else:
        tokenizer = tokenizers.load(config.data.tokenizer, 0, (), directory=config.data.directory)
    run = _build(config, record.vocab_size)
    read = tuple(dict.fromkeys((*run_record.parameters(config), *fields)))
    abstract = run.abstract_state()
    state = run_record.restore(record, abstract, flag, command.say, step, fields=read)
    return Loaded(config, run, tokenizer, state, int(state.step))


def merged(loaded: Loaded) -> Loaded:
    """The same model with its adapters in its matrices, and no packed ones."""
    if not loaded.config.model.adapter_rank and loaded.config.train.frozen == "as_is":
        return loaded
    config = loaded.config.copy_and_resolve_references()
    config.model.adapter_rank = 0
    if BASE in config.objective.references.values():
        # There is no model below the adapters any more to compare with.
        config.objective.update(name="weighted", loss="cross_entropy", weighting="uniform")
        config.objective.references.update(
            {n: "" for n, source in config.objective.references.items() if source == BASE}
        )
    config.train.update(trainable="", frozen="as_is")
    run = _build(config, loaded.run.model.config.vocab_size)
    with jax.set_mesh(run.mesh):
        merge = functools.partial(adapters.merge, loaded.run.model.config)
        trained, state = loaded.run.usable(loaded.state)[0], loaded.state
        trained = trained._replace(params=jax.jit(merge)(trained.params))
    return loaded._replace(
        config=config, run=run, state=state._replace(trained=trained, ema=trained)
    )


def on_grids(loaded: Loaded) -> Mapping[str, packed.Coded]:
    """Codes and grids of the quantized parameters; {} for a model in full precision."""
    trained, quantized = loaded.run.usable(loaded.state)
    if loaded.coded or not quantized:
        return loaded.coded
    rules = loaded.run.quantized.rules
    return after_training.put_on_grids(trained.params, trained.scales, rules).coded


def _ends(config: ConfigDict) -> tuple[str, str]:
    """The end and the beginning of text that a run has recorded."""
    return config.data.end_of_text, config.data.beginning_of_text


def _build(config: ConfigDict, vocab_size: int) -> experiment.Experiment:
    """The functions of a config, its mesh being that of --config.mesh.*, one device by default."""
    # The mesh of training need not be the mesh of today.
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | command.mesh()
    config.mesh.update(sizes)
    count = math.prod(sizes.values())
    devices = jax.devices() if count < 0 else jax.devices()[:count]
    return experiment.build(config, vocab_size, devices=devices)
