"""The mesh, and where each axis of each array lies on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.errors import InputError

AXES = ("data", "fsdp", "tensor", "sequence")

# Names that the model gives to the axes of its arrays -> mesh axes. Parameters are sharded over
# fsdp by their "embed" axis; activations name that axis None and stay whole.
RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("rank", None),
    ("code", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(
    sizes: dict[str, int], devices: Sequence[jax.Device] | int | None = None
) -> Mesh | AbstractMesh:
    """A mesh with the four axes; one size may be -1 and takes the devices that are left.

    Args:
      sizes: size of each axis.
      devices: all by default; a number gives a mesh of that many devices that need not exist, on
        which arrays have shardings but no place.

    Raises:
      InputError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = devices if isinstance(devices, int) else len(devices)
    shape = [sizes[axis] for axis in AXES]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise InputError(f"{asked}: sizes are at least 1, and one of them may be -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        raise InputError(f"{asked} does not match {count} device{'s' * (count > 1)}")
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(devices, int):
        return AbstractMesh(tuple(shape), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:  # axes that do not lie along those of a TPU's torus
        raise InputError(f"{asked}: {' '.join(str(error).split())[:200]}") from None


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, sequence_length: int) -> None:
    """Raises InputError unless rows and tokens divide over micro-batches and devices."""
    if accumulation < 1 or batch_size < 1 or batch_size % accumulation:
        raise InputError(
            f"train.batch_size={batch_size} is not divisible by train.accumulation={accumulation}"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // accumulation) % shards:
        raise InputError(
            f"train.batch_size={batch_size} / train.accumulation={accumulation} = "
            f"{batch_size // accumulation} rows are not divisible by the {shards} devices of "
            f"mesh.data x mesh.fsdp; valid: a multiple of {accumulation * shards}"
        )
    if sequence_length < 2:
        raise InputError(f"data.sequence_length={sequence_length} must be at least 2")
    if sequence_length % mesh.shape["sequence"]:
        raise InputError(
            f"data.sequence_length={sequence_length} is not divisible by "
            f"mesh.sequence={mesh.shape['sequence']}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a [B, T] array: rows over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shardings of a parameter tree by `RULES`; an axis that does not divide stays whole.

    Args:
      mesh: the mesh.
      shapes: tree of arrays or of their shapes.
      axes: tree of PartitionSpecs that name their axes.
    """

    def place(leaf, names):
        spec = (mesh_axes(mesh, n, size) for size, n in zip(leaf.shape, names, strict=True))
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    return jax.tree.map(place, shapes, axes)


def mesh_axes(mesh: Mesh | AbstractMesh, name: str, size: int) -> tuple[str, ...]:
    """What an array's axis of that name and size lies on by `RULES`; () where it is whole."""
    axes = dict(RULES)[name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def share(mesh: Mesh) -> tuple[int, int]:
    """Which share of the rows of a batch this process reads, and how many shares there are.

    Processes whose devices hold the same rows, as they do where a tensor or sequence axis spans
    processes, have the same share.

    Raises:
      InputError: a process has rows of parts of two shares.
    """
    if jax.process_count() == 1:
        return 0, 1
    blocks = _blocks(mesh)
    shares = sorted(set(blocks.values()))
    size = len(shares[0])
    if any(list(one) != list(range(i * size, (i + 1) * size)) for i, one in enumerate(shares)):
        raise InputError(
            "mesh.data and mesh.fsdp do not share rows evenly among the processes: let their "
            f"product be a multiple of the {jax.process_count()} processes, or divide it"
        )
    return shares.index(blocks[jax.process_index()]), len(shares)


def _blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> blocks of rows that its devices hold, of as many as the mesh cuts a batch in."""
    blocks = {}
    fsdp = mesh.shape["fsdp"]
    for (data, shard, *_), device in np.ndenumerate(mesh.devices):
        blocks.setdefault(device.process_index, set()).add(data * fsdp + shard)
    return {process: tuple(sorted(found)) for process, found in blocks.items()}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from the rows of this process's `share`."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }
    index, count = share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * count, *rows.shape[1:])
        first = index * len(rows)

        def piece(where):
            start, stop, _ = where[0].indices(shape[0])
            return rows[(slice(start - first, stop - first), *where[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: put(rows) for name, rows in batch.items()}


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process; all of them have to ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def agreed(value: bool) -> bool:
    """What process 0 says; all of them have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))
