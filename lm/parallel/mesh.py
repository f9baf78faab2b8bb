"""The mesh, and where each axis of each array lies on it."""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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
    ("position", None),
    ("layers", None),
)


def make_mesh(
    sizes: dict[str, int], devices: Sequence[jax.Device] | int | None = None
) -> Mesh | AbstractMesh:
    """A mesh with the four axes; one size may be -1 and takes the devices that are left.

    Of several TPU slices only the data axis, the outermost, spans the network between them: see
    `arrange`.

    Args:
      sizes: size of each axis.
      devices: all by default; a number gives a mesh of that many devices that need not exist, on
        which arrays have shardings but no place.

    Raises:
      InputError: sizes that do not multiply to the number of devices, or cannot be laid on them.
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
        if len(_slices(devices)) == 1:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        return Mesh(arrange(shape, devices), AXES, axis_types=types)
    except NotImplementedError as error:  # axes that do not lie along those of a TPU's torus
        raise InputError(f"{asked}: {' '.join(str(error).split())[:200]}") from None


def arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of several slices as an array of this shape, in the order of `AXES`.

    Slice s of S holds entries s D / S to (s + 1) D / S of the data axis of size D, and all of the
    other axes, so that what crosses the network between slices is the sum of gradients once a step.

    JAX counts hosts of GPUs as slices, too. Where the data axis is no multiple of them, the other
    axes span hosts, in the order of the devices' ids.

    Raises:
      InputError: TPU slices of unequal sizes, or a data axis that is no multiple of their number.
      NotImplementedError: the axes do not lie along those of a slice.
    """
    slices = _slices(devices)
    count, data, inner = len(slices), shape[0], list(shape[1:])
    if len(set(slices.values())) == 1 and data % count == 0:
        return mesh_utils.create_hybrid_device_mesh(
            [data // count, *inner],
            [count, *(1 for _ in inner)],
            devices,
            # As jax.make_mesh has it for one slice.
            allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),
        )
    if devices[0].platform == "tpu":
        raise InputError(
            f"mesh.data={data} is not divisible by the {count} slices of "
            f"{' and '.join(map(str, sorted(set(slices.values()))))} devices, and no other axis "
            f"may span slices; valid: a multiple of {count}, on slices of one size"
        )
    return np.array(sorted(devices, key=lambda device: device.id)).reshape(shape)


def _slices(devices: Sequence[jax.Device]) -> collections.Counter[int]:
    """The number of devices of each slice; one slice where devices do not say."""
    return collections.Counter(getattr(device, "slice_index", 0) for device in devices)


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


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array [B, ...] of which every device has whole rows: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
    axes = lying_on(name)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def lying_on(name: str) -> tuple[str, ...]:
    """The mesh axes of an array's axis by `RULES`."""
    axes = dict(RULES)[name] or ()
    return (axes,) if isinstance(axes, str) else axes


class Whole(NamedTuple):
    """A parameter that every device holds whole: its path, shape, bytes, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    why: str


def unsharded(mesh: Mesh | AbstractMesh, shapes: Any, axes: Any) -> list[Whole]:
    """The parameters that every device of the mesh holds whole, largest first.

    Args:
      mesh: the mesh.
      shapes: tree of arrays or of their shapes.
      axes: tree of PartitionSpecs that name their axes.
    """
    found = []
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(axes), strict=True
    ):
        named = list(zip(names, leaf.shape, strict=True))
        if any(mesh.shape[a] > 1 for one in named for a in mesh_axes(mesh, *one)):
            continue
        refused = [
            f"{name} is not divisible by mesh.{axis}={mesh.shape[axis]}"
            for name, size in named
            for axis in lying_on(name)
            if size % mesh.shape[axis]
        ]
        found.append(
            Whole(
                jax.tree_util.keystr(path, simple=True, separator="/"),
                leaf.shape,
                math.prod(leaf.shape) * leaf.dtype.itemsize,
                " and ".join(refused) or "no axis of it is to be divided",
            )
        )
    return sorted(found, key=lambda one: -one.bytes)


def check_unsharded(mesh: Mesh | AbstractMesh, shapes: Any, axes: Any, tolerance: float) -> None:
    """Refuses a mesh on which fsdp and tensor leave too much of a model whole.

    Args:
      mesh: the mesh, one of the two above 1.
      shapes, axes: as for `unsharded`.
      tolerance: the share of all parameters that may be.

    Raises:
      InputError: names the largest of them, and why they are.
    """
    found = unsharded(mesh, shapes, axes)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    part = sum(math.prod(one.shape) for one in found) / total
    if part > tolerance:
        largest = "; ".join(
            f"{one.name} [{', '.join(map(str, one.shape))}], {one.why}" for one in found[:3]
        )
        raise InputError(
            f"mesh.unsharded_tolerance={tolerance}: on a mesh of mesh.fsdp={mesh.shape['fsdp']} "
            f"and mesh.tensor={mesh.shape['tensor']} every device would hold {part:.1%} of the "
            f"parameters whole: {largest}; valid: sizes that divide, or a larger tolerance"
        )


def share(mesh: Mesh) -> tuple[int, int]:
    """Which share of the rows of a batch this process reads, and how many shares there are.

    Processes with the same rows on their devices, where a tensor or sequence axis spans
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


def first_processes(mesh: Mesh) -> list[int]:
    """Of each `share` the first process that has it."""
    if jax.process_count() == 1:
        return [0]
    blocks = _blocks(mesh)
    return [
        min(process for process, its in blocks.items() if its == rows)
        for rows in sorted(set(blocks.values()))
    ]


def _blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> blocks of rows that its devices hold, of as many as the mesh cuts a batch in."""
    blocks = {}
    fsdp = mesh.shape["fsdp"]
    for (data, shard, *_), device in np.ndenumerate(mesh.devices):
        blocks.setdefault(device.process_index, set()).add(data * fsdp + shard)
    return {process: tuple(sorted(found)) for process, found in blocks.items()}


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], sharding: NamedSharding | None = None
) -> dict[str, jax.Array]:
    """Global arrays from the rows of this process's `share`, by default with `batch_sharding`."""
    sharding = sharding or batch_sharding(mesh)
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


def local_rows(mesh: Mesh, x: jax.Array) -> np.ndarray:
    """The rows of this process's `share` of an array with `row_sharding`; nothing is exchanged."""
    if jax.process_count() == 1:
        return np.asarray(x)
    pieces = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process; all of them have to ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
