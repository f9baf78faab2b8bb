"""Which remat policy, number of micro-batches and mesh are fastest among those that fit.

Every candidate is the same run: the same model, batch and number of devices.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from lm.errors import InputError
from lm.model import splash
from lm.planning.ahead import Compilation, Topology
from lm.planning.plan import count_bytes
from lm.training import experiment
from lm.training.state import parameter_shapes

# Policies of model.remat, and how often a model's FLOPs are computed under each: everything twice
# that was forward, or only what is not a product of matrices.
_REMAT = {"none": 1.0, "dots": 1.0, "full": 4 / 3}

# Parameters are gathered in bfloat16 forward and backward, gradients scattered in float32.
_GATHERED_BYTES = 2 * 2 + 4


class Candidate(NamedTuple):
    """A run that may be tried.

    Attributes:
      changes: key of the config -> value, of remat, accumulation and the mesh.
      config: the config with these changes.
      rough_seconds: see `rough_seconds`; for the order in which candidates are tried only.
    """

    changes: dict[str, Any]
    config: ConfigDict
    rough_seconds: float


class Found(NamedTuple):
    """A candidate that was compiled."""

    changes: dict[str, Any]
    compilation: Compilation


def search(
    candidates: list[Candidate],
    compile_step: Callable[[ConfigDict], Compilation],
    seconds: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Found]:
    """Compiles candidates in their order and gives those that fit, fastest first.

    None is begun that would end too late if it took as long as the longest so far.

    Args:
      candidates: from `propose`.
      compile_step: (config) -> what the compiler says of it; InputError passes over a candidate.
      seconds: how long to go on.
      say: shows one line a candidate.
      clock: seconds that go on.
    """
    start, longest, found = clock(), 0.0, []
    for i, candidate in enumerate(candidates):
        before = clock()
        if before - start + longest > seconds:
            say(f"{seconds / 60:g} minutes are over: {len(candidates) - i} candidates not tried")
            break
        try:
            compiled = compile_step(candidate.config)
        except InputError as error:
            say(f"{i + 1}/{len(candidates)} {flags(candidate.changes)}: refused: {error}")
            continue
        finally:
            longest = max(longest, clock() - before)
        say(f"{i + 1}/{len(candidates)} {flags(candidate.changes)}: {_verdict(compiled)}")
        if compiled.fits and compiled.estimate:
            found.append(Found(candidate.changes, compiled))
    return sorted(found, key=_speed, reverse=True)


def propose(config: ConfigDict, vocab_size: int, topology: Topology) -> list[Candidate]:
    """All runs that are worth compiling, the roughly fastest first.

    Powers of two of micro-batches; meshes whose data, fsdp and tensor axes multiply to the devices
    that mesh.sequence leaves, tensor up to 8 or as the config has it; and the three policies of
    remat. What cannot be built is left out, and what holds more than a chip has, counting what is
    certain alone: train state, gradients in float32, and the input of every layer.
    """
    found = []
    for mesh in _meshes(config, topology):
        one = _changed(config, mesh | {"train.accumulation": 1})
        try:
            run = experiment.build(one, vocab_size, topology.chips)
        except InputError:
            continue
        certain = _certain_bytes(run)
        parameters = sum(x.size for x in jax.tree.leaves(parameter_shapes(run.model)))
        rows = config.train.batch_size // (run.mesh.shape["data"] * run.mesh.shape["fsdp"])
        times = {2**i for i in range(rows.bit_length())} | {config.train.accumulation}
        for accumulation in sorted(n for n in times if rows % n == 0):
            if certain + _kept(run, accumulation) > topology.memory:
                continue
            for remat in _REMAT:
                changes = {"model.remat": remat, "train.accumulation": accumulation, **mesh}
                seconds = rough_seconds(run, topology, parameters, remat, accumulation)
                found.append(Candidate(changes, _changed(config, changes), seconds))
    return sorted(found, key=lambda one: one.rough_seconds)


def _meshes(config: ConfigDict, topology: Topology) -> Iterator[dict[str, int]]:
    devices = topology.chips // max(config.mesh.sequence, 1)
    for tensor in sorted({1, 2, 4, 8, max(config.mesh.tensor, 1)}):
        data = topology.slices
        while devices % (tensor * data) == 0:
            yield {
                "mesh.data": data,
                "mesh.fsdp": devices // tensor // data,
                "mesh.tensor": tensor,
            }
            data *= 2


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, name = key.split(".")
        changed[section][name] = value
    return changed


def rough_seconds(
    run: experiment.Experiment, topology: Topology, parameters: int, remat: str, accumulation: int
) -> float:
    """A step by formulas alone: FLOPs at the peak, recomputed ones included, and bytes received.

    Of the latter: parameters are gathered over fsdp and their gradients scattered, for each
    micro-batch; gradients are summed over data and sequence; each layer sums the residual stream
    over tensor twice forward, twice backward and, with remat, twice more, and `sequence_bytes`
    are those of attention. To rank, not to believe.
    """
    c, mesh = run.config, run.mesh.shape
    tokens = c.train.batch_size * c.data.sequence_length
    flops = run.flops_per_token() * tokens / run.mesh.size * _REMAT[remat]
    share = parameters / mesh["tensor"]
    received = accumulation * _GATHERED_BYTES * share * (1 - 1 / mesh["fsdp"])
    received += 2 * 4 * share / mesh["fsdp"] * (1 - 1 / (mesh["data"] * mesh["sequence"]))
    received += sequence_bytes(run, remat)
    sums = 4 + 2 * (remat != "none")
    received += 2 * sums * accumulation * _kept(run, accumulation) * (1 - 1 / mesh["tensor"])
    return flops / topology.peak_flops + received / topology.interconnect


def sequence_bytes(run: experiment.Experiment, remat: str) -> float:
    """Bytes that a device receives over sequence in a step, for the attention of all layers.

    Of S devices along the length each gathers the keys and values of its rows, (S - 1) / S of them,
    in every forward pass, of which remat makes two, and scatters their gradients once. Queries and
    outputs are exchanged by halves where `lm.model.splash` balances, forward and backward.
    """
    c, mesh, model = run.config, run.mesh.shape, run.model.config
    shards, length = mesh["sequence"], c.data.sequence_length
    passes = 1 + (remat != "none")
    tokens = c.train.batch_size * length * mesh["tensor"] / run.mesh.size
    gathered = 2 * model.kv_heads * (shards - 1) * (passes + 1)
    exchanged = 2 * model.heads * splash.balanced(length, shards) / 2 * (passes + 1)
    width = model.head_width / mesh["tensor"]
    return model.layers * tokens * (gathered + exchanged) * width * _itemsize(c)


def least_bytes(run: experiment.Experiment, accumulation: int) -> int:
    """What a device certainly holds during a step.

    Train state, gradients in float32, and the input of every layer for one micro-batch.
    """
    return _certain_bytes(run) + int(_kept(run, accumulation))


def _certain_bytes(run: experiment.Experiment) -> int:
    state = run.abstract_state()
    leaves = jax.tree.leaves(state.trained.params)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return count_bytes(state).per_device + 4 * held


def _kept(run: experiment.Experiment, accumulation: int) -> float:
    """Bytes of the inputs of all layers, for a micro-batch, on a device."""
    c = run.config
    tokens = c.train.batch_size / accumulation * c.data.sequence_length
    tokens *= run.mesh.shape["tensor"] / run.mesh.size
    return c.model.layers * tokens * c.model.width * _itemsize(c)


def _itemsize(config: ConfigDict) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _speed(found: Found) -> tuple[float, float]:
    return found.compilation.estimate.overlapped_mfu, found.compilation.estimate.sequential_mfu


def _verdict(compiled: Compilation) -> str:
    if not compiled.fits:
        return f"does not fit ({compiled.seconds:.0f} s)"
    if compiled.estimate is None:
        return f"fits, without an estimate of its time ({compiled.seconds:.0f} s)"
    e = compiled.estimate
    mfu = f"MFU {e.sequential_mfu:.1%} to {e.overlapped_mfu:.1%}"
    return f"fits, {mfu} ({compiled.seconds:.0f} s)"


def flags(changes: dict[str, Any]) -> str:
    """The flags that make a candidate of its config."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
