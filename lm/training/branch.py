"""A run that begins with the full-precision phase of another one."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.errors import InputError
from lm.training import experiment, runs
from lm.training.state import TrainState

_KEY = "quantization.from"


def start(
    run: experiment.Experiment, iterator: grain.DatasetIterator, say: Callable[[str], None]
) -> TrainState:
    """The state that `quantization.from` gives.

    With a first phase (quantization.fraction below 1), that of the other run at the switch:
    parameters, optimizer, position in the data and step, so that this run is, bit for bit, what it
    would have been had it trained that phase itself. Several quantized runs can share one. With
    quantization.fraction = 1, the parameters of its newest checkpoint, at step 0.

    Args:
      run: the run that begins.
      iterator: of its data; moved to where the other run was.
      say: shows a line.

    Raises:
      InputError: the other run is not a full-precision run of the same model, data and first
        phase, or has no checkpoint at the switch.
    """
    source = run.config.quantization["from"]
    switch, record = run.phases.switch, runs.read(source, _KEY)
    other = other_run(run, record.config, run.mesh.devices.ravel())
    if switch:
        old = runs.restore(record, other, _KEY, say, switch, iterator)
    else:
        old = runs.restore(record, other, _KEY, say)
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
    fresh = jax.jit(run.init, out_shardings=shardings)(jax.random.key(run.config.train.seed))
    if switch:
        say(f"starts with step {switch} of {source}")
        return _graft(fresh, old)
    params = (old.ema if record.config.train.ema_decay else old.trained).params
    say(f"starts with the parameters of step {int(old.step)} of {source}")
    ema = fresh.ema._replace(params=jax.tree.map(jnp.copy, params)) if fresh.ema else ()
    return fresh._replace(trained=fresh.trained._replace(params=params), ema=ema)


def other_run(
    run: experiment.Experiment, config: ConfigDict, devices: Sequence[jax.Device] | int
) -> experiment.Experiment:
    """The functions of the other run, which has `config`, on this run's devices.

    Raises:
      InputError: it is not a full-precision run of the same model, data and first phase.
    """
    ours, source = run.config, run.config.quantization["from"]
    sections = ["model", "data"]
    if run.phases.switch:
        sections += ["train.batch_size", "train.seed", "train.ema_decay", "optimizer", "objective"]
    for section in sections:
        for key in _keys(ours, section):
            mine, its = _get(ours, key), _get(config, key)
            if mine != its:
                raise InputError(
                    f"quantization.from={source} was trained with {key}={its}, not {mine}"
                )
    config = config.copy_and_resolve_references()
    config.mesh = ours.mesh
    plain = experiment.build(config, run.model.config.vocab_size, devices)
    if not run.phases.switch:
        return plain
    if plain.phases.switch < run.phases.switch:
        raise InputError(
            f"quantization.from={source} is quantized from step {plain.phases.switch} on, before "
            f"the switch of this run at step {run.phases.switch}"
        )
    steps = np.arange(run.phases.switch)
    rates = (np.array([float(r.schedule(i)) for i in steps]) for r in (run, plain))
    if differing := np.flatnonzero(np.not_equal(*rates)).tolist():
        raise InputError(
            f"quantization.from={source} has another learning rate from step {differing[0]} on, "
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
