"""The mesh, and where each axis of each array lies on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
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
    rules = dict(RULES)

    def place(leaf, names):
        spec = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = rules[name]
            spec.append(axis if axis and size % _size(mesh, axis) == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, shapes, axes)


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process has read."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
