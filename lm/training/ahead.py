"""The train step of a run, compiled ahead of time for a TPU that is not here, and read.

The compiler for TPUs comes with the package libtpu and needs no TPU.
"""

import collections
import importlib.util
import math
import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.data.layout import BATCH
from lm.errors import InputError
from lm.training import experiment, metrics, sharding
from lm.training.second_models import open_references

GIB = 2**30


class Chip(NamedTuple):
    """A TPU: memory in bytes, number of torus dimensions, chips of the largest slice."""

    memory: int
    dimensions: int
    largest: int


# From the maker's data sheets (cloud.google.com/tpu/docs, "system architecture" of each version),
# whose GB are 2^30 bytes: of the 16 GB of a v5e, XLA leaves a program 15.75 GiB. A v4 is missing:
# without one, libtpu shows each of its chips as two devices, of which JAX makes no mesh.
CHIPS = {
    "v5e": Chip(16 * GIB, 2, 256),
    "v5p": Chip(95 * GIB, 3, 8960),
    "v6e": Chip(32 * GIB, 2, 256),
}


class Topology(NamedTuple):
    """A slice of TPUs.

    Attributes:
      name: for example v5e:16x16.
      chips: number of chips.
      devices: JAX devices to compile for, one a chip.
      memory: bytes of one chip.
      peak_flops: dense bfloat16 FLOP/s of one chip.
    """

    name: str
    chips: int
    devices: list[jax.Device]
    memory: int
    peak_flops: float


def load_topology(name: str) -> Topology:
    """The slice of a name such as v5e:16x16 or v5p:8x8x8.

    Raises:
      InputError: no such slice, or libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kinds = ", ".join(CHIPS)
    if not match or match[1] not in CHIPS:
        raise InputError(f"--topology={name} is not KIND:AxB or KIND:AxBxC with KIND of {kinds}")
    chip, sizes = CHIPS[match[1]], [int(size) for size in match[2].split("x")]
    # libtpu ends the process on a size of 0, and compiles for slices that nobody can have.
    if len(sizes) != chip.dimensions or min(sizes) < 1 or math.prod(sizes) > chip.largest:
        raise InputError(
            f"--topology={name}: a {match[1]} slice has {chip.dimensions} dimensions, each at "
            f"least 1, and at most {chip.largest} chips"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--topology needs the package libtpu: install the extra tpu, "
            "for example pip install -e '.[tpu]'"
        )
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={name}: {_one_line(error)}") from None
    peak = metrics.PEAK_FLOPS[devices[0].device_kind]
    return Topology(name, len(devices), devices, chip.memory, peak)


class Memory(NamedTuple):
    """Bytes of one device during a step, as XLA has assigned them.

    Attributes:
      arguments: train state, batch and second models.
      outputs: train state and metrics.
      aliased: outputs that take the place of arguments, by donation.
      temporaries: gradients, activations and all else.
      code: the program.
      total: arguments + outputs - aliased + temporaries + code.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    total: int


class Collective(NamedTuple):
    """How often a step runs collectives of one kind, and the bytes of their results on a device."""

    count: int
    bytes: int


class Compilation(NamedTuple):
    """What `compile_step` reads off the compiled train step; figures are those of one device.

    Attributes:
      seconds: time to compile.
      fits: whether it fits into the memory; when not, `refused` is XLA's reason and the fields
        after it are None.
      memory: bytes; Memory.
      model_flops: FLOPs of a step by the formula of `metrics.flops_per_token`.
      counted_flops: XLA's count, in which the body of a loop counts once, however often it runs.
        With remat it includes what is recomputed.
      loops: how often each loop of the program runs (layers, blocks of the vocabulary,
        micro-batches, and XLA's own); empty when all are unrolled.
      collectives: by kind, loops counted as often as they run.
      optimal_seconds: XLA's estimate of a step; None when it has none, see `estimated_seconds`.
      mfu: model_flops / (optimal_seconds x peak FLOP/s), or None.
    """

    seconds: float
    fits: bool
    refused: str = ""
    memory: Memory | None = None
    model_flops: float | None = None
    counted_flops: float | None = None
    loops: tuple[int, ...] | None = None
    collectives: dict[str, Collective] | None = None
    optimal_seconds: float | None = None
    mfu: float | None = None


def compile_step(run: experiment.Experiment, topology: Topology) -> Compilation:
    """Compiles the train step of a run that was built for `topology.devices`.

    Raises:
      InputError: the model cannot be compiled for a TPU, for example with cuDNN attention; or a
        reference has no source.
    """
    if run.config.model.attention == "cudnn":
        raise InputError("model.attention=cudnn runs on GPUs only; valid for a TPU: auto, einsum")
    start = time.perf_counter()
    # Outside of the mesh, on whose devices no random key can be made.
    references = open_references(run)
    step = run.train_step({source: one.run.model for source, one in references.models.items()})
    state, batch = run.abstract_state(), abstract_batch(run, references.scores)
    frozen = references.abstract()
    try:
        with jax.set_mesh(run.mesh):
            compiled = step.lower(state, batch, frozen).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compilation(time.perf_counter() - start, False, _one_line(error))
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes,
    )
    c, costs = run.config, compiled.cost_analysis()
    tokens = c.train.batch_size * c.data.sequence_length
    flops = run.flops_per_token() * tokens / run.mesh.size
    loops, collectives = read_program(compiled.as_text())
    estimate = estimated_seconds(costs.get("optimal_seconds"), loops)
    return Compilation(
        seconds,
        memory.total <= topology.memory,
        memory=memory,
        model_flops=flops,
        counted_flops=costs["flops"],
        loops=loops,
        collectives=collectives,
        optimal_seconds=estimate,
        mfu=flops / (estimate * topology.peak_flops) if estimate else None,
    )


def abstract_batch(
    run: experiment.Experiment, stored: Iterable[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch; see `lm.data.batches`.

    Args:
      run: the run.
      stored: names of the references that are stored with the data.
    """
    shape = (run.config.train.batch_size, run.config.data.sequence_length)
    placed = sharding.batch_sharding(run.mesh)
    dtypes = BATCH | dict.fromkeys(stored, jnp.dtype(jnp.float32))
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for n, dtype in dtypes.items()}


def estimated_seconds(optimal_seconds: float | None, loops: tuple[int, ...]) -> float | None:
    """XLA's `optimal_seconds` where it means something, else None.

    It counts the body of a loop once, however often it runs. And it seems to take an instruction
    that it cannot estimate for -1 s: small steps on v5e came out at -7.999 to -12.998 s, on v5p
    and v6e at the fraction alone (libtpu 0.0.42). A step of many seconds could hide one.
    """
    usable = optimal_seconds is not None and optimal_seconds > 0 and max(loops, default=1) == 1
    return optimal_seconds if usable else None


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([^ ,)]+)")
_BRANCHES = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")


def read_program(text: str) -> tuple[tuple[int, ...], dict[str, Collective]]:
    """Loops and collectives of an optimized HLO module, followed from its entry.

    A collective inside a loop counts as often as the loop runs. On TPU, one that runs beside
    other work appears in every fusion that moves it on; it counts where it starts. A fusion that
    XLA has named all-reduce-scatter is a reduce-scatter, with the bytes that go into it.

    Args:
      text: `compiled.as_text()`.

    Returns:
      How often each loop runs, with a loop inside another one once; and collectives by kind.
    """
    bodies, entry = _computations(text)
    loops: dict[str, int] = {}
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found and not re.search(r'"flag_start":"\d', line):
                kind = "reduce-scatter" if "all-reduce-scatter" in name else found[2]
                arrays = [_array_bytes(*array) for array in _ARRAY.findall(found[1])]
                # The result of a start is a tuple of operand and result.
                pair = found[3] and kind in ("all-gather", "collective-permute")
                counts[kind] += times
                sizes[kind] += times * (max(arrays) if pair else sum(arrays))
            if " while(" in line:
                body = re.search(r"body=%([^ ,]+)", line)[1]
                loops[body] = _trips(line, bodies)
                visit(body, times * loops[body])
            else:
                for called in _callees(line):
                    visit(called, times)

    visit(entry, 1)
    return tuple(loops.values()), {
        kind: Collective(counts[kind], sizes[kind]) for kind in sorted(counts)
    }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _callees(line: str) -> list[str]:
    several = [name.strip(" %") for names in _BRANCHES.findall(line) for name in names.split(",")]
    return _CALLED.findall(line) + several


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA says, or the one number that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = "\n".join(bodies[re.search(r"condition=%([^ ,]+)", line)[1]])
    limits = re.findall(r" constant\((\d+)\)", condition)
    return int(limits[0]) if len(limits) == 1 else 1


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _one_line(error: Exception) -> str:
    """The first sentences of an error of XLA, without its list of allocations."""
    message = str(error).partition("\n\n")[0].split("\n  ")[0]
    return " ".join(message.split())[:300]
