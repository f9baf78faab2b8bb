"""A run that begins with the full-precision phase of another one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from lm.errors import InputError
from lm.references.second_models import check_tokens
from lm.runs import run_record
from lm.runs.checkpoints import saved_steps
from lm.training import experiment
from lm.training.state import TrainState, average_as_model, first_average

_KEY = "quantization.from"


class Source(NamedTuple):
    """The run that `quantization.from` names, and its functions on this run's devices."""

    record: run_record.Record
    run: experiment.Experiment


def open_source(run: experiment.Experiment, tokenizer: str) -> Source:
    """Looks at the other run, and restores nothing.

    Args:
      run: the run that begins.
      tokenizer: fingerprint of its tokenizer.

    Raises:
      InputError: the other run is not a full-precision run of the same model, data and first
        phase, or has no checkpoint at the switch.
    """
    record, switch = run_record.read(run.config.quantization["from"], _KEY), run.phases.switch
    source = f"{_KEY}={record.folder}"
    check_tokens(
        source,
        (record.vocab_size, record.tokenizer),
        (run.model.config.vocab_size, tokenizer),
    )
    other = other_run(run, record.config, source)
    steps = saved_steps(record.folder / "checkpoints")
    if switch and switch not in steps:
        raise InputError(
            f"{source} has no checkpoint at step {switch}, where the quantized phase of this run "
            f"begins; it has {steps}. Train it with checkpoint.at_steps=({switch},)"
        )
    return Source(record, other)


def start(
    run: experiment.Experiment,
    source: Source,
    batches: Any,
    say: Callable[[str], None],
) -> TrainState:
    """The state that `quantization.from` gives.

    With a first phase (quantization.fraction below 1), that of the other run at the switch:
    parameters, optimizer, position in the data and step, so that this run is, bit for bit, what it
    would have been had it trained that phase itself. Several quantized runs can share one. With
    quantization.fraction = 1, the parameters of its newest checkpoint, at step 0.

    Args:
      run: the run that begins.
      source: of `open_source`.
      batches: the source of its batches; moved to where the other run was.
      say: shows a line.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    (record, other), switch = source, run.phases.switch
    abstract = other.abstract_state()
    if switch:
        old = run_record.restore(record, abstract, _KEY, say, switch, source=batches)
    else:
        fields = run_record.parameters(record.config)
        old = run_record.restore(record, abstract, _KEY, say, fields=fields)
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
    fresh = jax.jit(run.init, out_shardings=shardings)(jax.random.key(run.config.train.seed))
    if switch:
        say(f"starts with step {switch} of {record.folder}")
        return _graft(fresh, old)
    averaged = record.config.train.ema_decay > 0
    params = (average_as_model(run.model, old.ema) if averaged else old.trained).params
    say(f"starts with the parameters of step {int(old.step)} of {record.folder}")
    ema = fresh.ema._replace(params=first_average(params)) if fresh.ema else ()
    return fresh._replace(trained=fresh.trained._replace(params=params), ema=ema)


def other_run(run: experiment.Experiment, config: ConfigDict, source: str) -> experiment.Experiment:
    """The functions of the other run, which has `config`, on this run's devices.

    Raises:
      InputError: it is not a full-precision run of the same model, data and first phase; the
        message opens with `source`.
    """
    ours = run.config
    sections = ["model", "data"]
    if run.phases.switch:
        sections += ["train.batch_size", "train.seed", "train.ema_decay", "optimizer"]
        sections += ["objective", "rollouts"]
    for section in sections:
        for key in _keys(ours, section):
            mine, its = _get(ours, key), _get(config, key)
            if mine != its:
                raise InputError(f"{source} was trained with {key}={its}, not {mine}")
    config = config.copy_and_resolve_references()
    config.mesh = ours.mesh
    mesh = run.mesh
    devices = mesh.size if isinstance(mesh, AbstractMesh) else mesh.devices.ravel()
    plain = experiment.build(config, run.model.config.vocab_size, devices)
    if not run.phases.switch:
        return plain
    if plain.phases.switch < run.phases.switch:
        raise InputError(
            f"{source} is quantized from step {plain.phases.switch} on, before "
            f"the switch of this run at step {run.phases.switch}"
        )
    steps = np.arange(run.phases.switch)
    rates = (np.array([float(r.schedule(i)) for i in steps]) for r in (run, plain))
    if differing := np.flatnonzero(np.not_equal(*rates)).tolist():
        raise InputError(
            f"{source} has another learning rate from step {differing[0]} on, "
            f"before the switch of this run at step {run.phases.switch}: train.steps and the "
            "optimizer section decide it"
        )
    return plain


def _keys(config: ConfigDict, prefix: str) -> list[str]:
    value = _get(config, prefix)
    if not isinstance(value, ConfigDict):
        return [prefix]
    return [key for name in value for key in _keys(config, f"{prefix}.{name}")]


def _get(config: ConfigDict, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name)
        if config is None:
            return None
    return list(config) if isinstance(config, tuple) else config


def _graft(fresh: TrainState, old: TrainState) -> TrainState:
    """`fresh` with every leaf that `old` has at the same path: all but scales and their moments."""
    known = dict(jax.tree_util.tree_leaves_with_path(old))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: known.get(path, leaf), fresh)
