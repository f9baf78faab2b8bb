"""The train step of a run, compiled ahead of time for a TPU that is not here, and read.

The compiler for TPUs comes with the package libtpu and needs no TPU.
"""

import functools
import importlib.util
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.data.layout import BATCH, POLICY
from lm.data.pairs import KEYS
from lm.data.scores import Field
from lm.errors import InputError
from lm.model import splash
from lm.parallel.compiler import Options
from lm.parallel.mesh import batch_sharding
from lm.planning.flops import PEAK_FLOPS
from lm.planning.hlo import Collective, Program, read_program
from lm.planning.schedule import Overlap, overlap
from lm.references.second_models import open_references
from lm.training import experiment

GIB = 2**30


class Chip(NamedTuple):
    """A TPU.

    Attributes:
      memory: bytes.
      dimensions: of the torus.
      largest: chips of the largest slice.
      interconnect: bytes that it can receive from other chips in a second, all links together.
      network: the same from other slices, over the network of the data centre.
    """

    memory: int
    dimensions: int
    largest: int
    interconnect: float
    network: float


# From the maker's data sheets (cloud.google.com/tpu/docs, "system architecture" of each version),
# whose GB are 2^30 bytes: of the 16 GB of a v5e, XLA leaves a program 15.75 GiB. Interconnects are
# 1,600, 4,800 and 3,200 Gbit/s, and of v5e and v5p the pages say as well 400 and 1,200 GB/s both
# ways. The network of a v5p is 50 Gbit/s a chip, that of others is given for a whole pod: 6.4 and
# 25.6 Tbit/s. A v4 is missing: without one, libtpu shows each of its chips as two devices, of which
# JAX makes no mesh.
CHIPS = {
    "v5e": Chip(16 * GIB, 2, 256, 1600e9 / 8, 6.4e12 / 256 / 8),
    "v5p": Chip(95 * GIB, 3, 8960, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(32 * GIB, 2, 256, 3200e9 / 8, 25.6e12 / 256 / 8),
}


class Topology(NamedTuple):
    """A slice of TPUs.

    Attributes:
      name: for example v5e:16x16.
      chips: number of chips.
      devices: JAX devices to compile for, one a chip.
      memory: bytes of one chip.
      peak_flops: dense bfloat16 FLOP/s of one chip.
      interconnect: bytes that a chip receives in a second; see `Chip`.
      network: the same between slices.
      slices: number of slices, of `chips` in all.
    """

    name: str
    chips: int
    devices: list[jax.Device]
    memory: int
    peak_flops: float
    interconnect: float
    network: float
    slices: int = 1


def load_topology(name: str, slices: int = 1) -> Topology:
    """The slice of a name such as v5e:16x16 or v5p:8x8x8, or several of them.

    Raises:
      InputError: no such slice, or libtpu is not installed.
    """
    if slices < 1:
        raise InputError(f"--slices={slices} must be at least 1")
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
    require_libtpu()
    from jax.experimental import topologies

    try:
        options = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={name}: {_one_line(error)}") from None
    peak = PEAK_FLOPS[devices[0].device_kind]
    name = f"{slices} x {name}" if slices > 1 else name
    return Topology(
        name,
        len(devices),
        devices,
        chip.memory,
        peak,
        chip.interconnect,
        chip.network,
        slices,
    )


def require_libtpu() -> None:
    """Raises InputError without the package libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "to compile for a topology takes the package libtpu: install the extra tpu, "
            "for example pip install -e '.[tpu]'"
        )


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


class Estimate(NamedTuple):
    """How long a step takes: XLA's model of a device, and a lower bound of what it waits for.

    Attributes:
      compute_seconds: XLA's cycles of all instructions, loops counted as often as they run, made
        seconds by `flops_per_cycle`.
      kernel_seconds: of kernels, of which XLA knows nothing: their FLOPs at the peak, which is a
        lower bound.
      communication_seconds: bytes that a device cannot do without receiving, over the bandwidth of
        all its links together, or those from other slices over the network, whichever takes longer:
        a lower bound.
      overlapped_mfu: model FLOPs over those at the peak, in as long as computation and kernels
        take or communication, whichever is longer.
      sequential_mfu: the same in the sum of the three.
    """

    compute_seconds: float
    kernel_seconds: float
    communication_seconds: float
    overlapped_mfu: float
    sequential_mfu: float


class Compilation(NamedTuple):
    """What `compile_step` reads off the compiled train step; figures are those of one device.

    Attributes:
      seconds: time to compile, on the clock.
      cpu_seconds: the same of all processors together.
      compiler_options: options of XLA that it was compiled with, beyond its defaults.
      fits: whether it fits into the memory; when not, `refused` is XLA's reason and the fields
        after it are None.
      memory: bytes; Memory.
      model_flops: FLOPs of a step by the formula of `flops_per_token`.
      counted_flops: XLA's count, in which the body of a loop counts once, however often it runs.
        With remat it includes what is recomputed.
      loops: how often each loop of the program runs (layers, blocks of the vocabulary,
        micro-batches, and XLA's own); empty when all are unrolled.
      collectives: by kind and mesh axes, see `program.Program`.
      estimate: of its time; None when XLA has estimated no instruction.
      overlap: how much of the communication the compiler has scheduled beside computation.
    """

    seconds: float
    cpu_seconds: float
    compiler_options: Options
    fits: bool
    refused: str = ""
    memory: Memory | None = None
    model_flops: float | None = None
    counted_flops: float | None = None
    loops: tuple[int, ...] | None = None
    collectives: dict[str, dict[str, Collective]] | None = None
    estimate: Estimate | None = None
    overlap: Overlap | None = None


def compile_step(run: experiment.Experiment, topology: Topology) -> Compilation:
    """Compiles the train step of a run that was built for `topology.devices`.

    Raises:
      InputError: the model cannot be compiled for a TPU, for example with cuDNN attention; or a
        reference has no source.
    """
    if run.config.model.attention == "cudnn":
        raise InputError("model.attention=cudnn runs on GPUs only; valid for a TPU: auto, einsum")
    start, cpu_start = time.perf_counter(), time.process_time()
    # Outside of the mesh: no random key can be made on its devices.
    references = open_references(run)
    models = {source: one.run.model for source, one in references.models.items()}
    step = run.train_step(second_models=models)
    state, batch = run.abstract_state(), abstract_batch(run, references.fields())
    frozen = references.abstract()
    try:
        with jax.set_mesh(run.mesh):
            compiled = step.lower(state, batch, frozen).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        spent = time.perf_counter() - start, time.process_time() - cpu_start
        return Compilation(*spent, run.compiler_options, False, _one_line(error))
    spent = time.perf_counter() - start, time.process_time() - cpu_start
    memory = _memory(compiled.memory_analysis())
    c = run.config
    tokens = c.train.batch_size * c.data.sequence_length
    flops = run.flops_per_token() * tokens / run.mesh.size
    slices = [getattr(device, "slice_index", 0) or 0 for device in run.mesh.devices.flat]
    text = compiled.as_text()
    program = read_program(text, run.mesh.shape, slices)
    per_cycle = flops_per_cycle(topology.devices[0])
    return Compilation(
        *spent,
        run.compiler_options,
        memory.total <= topology.memory,
        memory=memory,
        model_flops=flops,
        counted_flops=compiled.cost_analysis()["flops"],
        loops=program.loops,
        collectives=program.collectives,
        estimate=estimate(
            program,
            topology,
            model_flops=flops,
            kernel_flops=kernel_flops(run, program.kernels),
            per_cycle=per_cycle,
        ),
        overlap=overlap(
            text,
            run.mesh.shape,
            functools.partial(communication_seconds, topology),
            per_cycle / topology.peak_flops,
            slices,
        ),
    )


def _memory(sizes: Any) -> Memory:
    arguments, outputs = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    aliased, temporaries = sizes.alias_size_in_bytes, sizes.temp_size_in_bytes
    code = sizes.generated_code_size_in_bytes
    total = arguments + outputs - aliased + temporaries + code
    return Memory(arguments, outputs, aliased, temporaries, code, total)


def kernel_flops(run: experiment.Experiment, kernels: int) -> float:
    """FLOPs of the attention kernels of a step on the busiest device; a row has T T / 2 pairs.

    A forward kernel multiplies twice. The two kernels of a backward pass multiply three times (for
    the queries) and four times (keys and values), for both compute the probabilities again: of
    three kernels nine products, and each forward pass more is two more.
    """
    c = run.config
    if not kernels:
        return 0.0
    times = c.model.layers * c.train.accumulation
    rows = c.train.batch_size / c.train.accumulation / (run.mesh.size / run.mesh.shape["tensor"])
    heads = c.model.width / run.mesh.shape["tensor"]
    length = c.data.sequence_length
    uneven = splash.imbalance(length, run.mesh.shape["sequence"])
    return (3 * times + 2 * kernels) * rows * length**2 * heads * uneven


def estimate(
    program: Program,
    topology: Topology,
    *,
    model_flops: float,
    kernel_flops: float,
    per_cycle: float,
) -> Estimate | None:
    """The time of a program on each device of a topology; None without cycles to count.

    Args:
      program: what was compiled.
      topology: gives the peak and the interconnect.
      model_flops: of a step, on one device.
      kernel_flops: of the kernels in it.
      per_cycle: see `flops_per_cycle`.
    """
    if not program.cycles:
        return None
    compute = program.cycles * per_cycle / topology.peak_flops
    kernels = kernel_flops / topology.peak_flops
    runs = [one for axes in program.collectives.values() for one in axes.values()]
    communication = communication_seconds(
        topology, sum(one.received for one in runs), sum(one.across for one in runs)
    )
    ideal = model_flops / topology.peak_flops
    return Estimate(
        compute,
        kernels,
        communication,
        ideal / max(compute + kernels, communication),
        ideal / (compute + kernels + communication),
    )


def communication_seconds(topology: Topology, received: int, across: int) -> float:
    """The least time in which a device receives bytes, and those of them from other slices."""
    return max(received / topology.interconnect, across / topology.network)


def abstract_batch(
    run: experiment.Experiment, stored: Mapping[str, Field] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch; see `lm.data.batches`.

    Args:
      run: the run.
      stored: name of what is stored with the data -> its type and width.
    """
    shape = (run.config.train.batch_size, run.config.data.sequence_length)
    placed = batch_sharding(run.mesh)
    found = {n: jax.ShapeDtypeStruct(shape, x, sharding=placed) for n, x in BATCH.items()}
    further = dict.fromkeys(KEYS, jnp.int32) | POLICY
    for name in further.keys() & set(run.objective.batch_keys):
        found[name] = jax.ShapeDtypeStruct(shape, further[name], sharding=placed)
    for name, field in (stored or {}).items():
        whole = (*shape, *field.shape)
        found[name] = jax.ShapeDtypeStruct(whole, field.dtype, sharding=placed)
    return found


@functools.cache
def flops_per_cycle(device: jax.Device) -> float:
    """The most FLOPs that XLA estimates for a cycle of a device, in a product of large matrices.

    It relates XLA's cycles to time without a clock, which the data sheets do not give: a cycle is
    as long as so many FLOPs at the peak. On v5e and v5p it is 0.98 of what the matrix units of a
    chip do in a cycle by their number and size (4 and 8 of 128 x 128), so that estimates are by so
    much too long (libtpu 0.0.42).
    """
    place = jax.sharding.SingleDeviceSharding(device)

    def rate(inner: int, outer: int) -> float:
        a = jax.ShapeDtypeStruct((outer, inner), jnp.bfloat16, sharding=place)
        b = jax.ShapeDtypeStruct((inner, outer), jnp.bfloat16, sharding=place)
        text = jax.jit(jnp.matmul).lower(a, b).compile().as_text()
        return 2 * inner * outer**2 / read_program(text).cycles

    return max(rate(inner, outer) for inner, outer in _PRODUCTS)


# Inner and outer sizes of products, of which the best is nearly the best of all that were tried.
_PRODUCTS = ((4096, 4096), (2048, 8192))


def _one_line(error: Exception) -> str:
    """The first sentences of an error of XLA, without its list of allocations."""
    message = str(error).partition("\n\n")[0].split("\n  ")[0]
    return " ".join(message.split())[:300]
