"""A loss on a mesh: every device passes over its own tokens and its own part of the vocabulary.

B batch, T length, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lm.parallel.mesh import mesh_axes
from objectives import losses
from objectives.cross_entropy import TokenStatistics
from objectives.losses import Inputs, Loss


def prediction_statistics(loss: Loss, inputs: Inputs) -> TokenStatistics:
    """`objectives.losses.prediction_statistics`, on the mesh that is set."""
    return _on_mesh(lambda inputs: losses.prediction_statistics(loss, inputs), inputs)


def training_statistics(loss: Loss, inputs: Inputs, data_weights_BT: jax.Array) -> TokenStatistics:
    """`objectives.losses.training_statistics`, on the mesh that is set."""
    return _on_mesh(
        lambda inputs, weights_BT: losses.training_statistics(loss, inputs, weights_BT),
        inputs,
        data_weights_BT,
    )


def _on_mesh(function: Callable[..., Any], inputs: Inputs, *arrays_BT: jax.Array) -> Any:
    """function(inputs, *arrays), each device with its rows, its tokens and its columns of heads.

    Left to itself, XLA gathers the whole head over the tensor axis, once a pass and in the backward
    pass once a block, and every device of that axis computes all logits of its tokens. Here [B, T]
    arrays cross that axis, and the sum of the gradient of the hidden states. What fsdp has of a
    head is gathered once, in the compute dtype, and its gradient scattered once: until then each
    device holds both for its own columns, 2 D V / tensor values.

    Rows, tokens or a vocabulary that their mesh axes do not divide are whole on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(inputs, *arrays_BT)

    def split(name, size):
        axes = mesh_axes(mesh, name, size)
        return tuple(axis for axis in axes if mesh.shape[axis] > 1) or None

    rows, length = inputs.targets.shape
    cells = PartitionSpec(split("batch", rows), split("length", length))
    columns = split("vocab", inputs.head.shape[1])
    teachers = inputs.teachers
    heads = [inputs.head, *(teacher.head for teacher in teachers.values())]
    states = [inputs.hidden, *(teacher.hidden for teacher in teachers.values())]
    # The axes along which devices do different work.
    used = _names(cells) | _names(PartitionSpec(columns))
    places = []
    for head in heads:
        shards = split("embed", head.shape[0])
        # Where rows are whole on each device, so is the head.
        places.append(PartitionSpec(shards if used.issuperset(shards or ()) else None, columns))

    def varying(x, spec):
        """x; its gradient is summed once over the devices that hold the same x."""
        return lax.pcast(x, tuple(sorted(used - _names(spec))), to="varying")

    def local(heads, states, cells_BT, params):
        whole = []
        for head, place in zip(heads, places, strict=True):
            head = varying(head, place)
            if place[0]:
                head = lax.all_gather(head, place[0], axis=0, tiled=True)
            whole.append(head)
        states = [varying(x, cells) for x in states]
        targets, keys, stored, *arrays = cells_BT
        parts = zip(teachers.items(), states[1:], whole[1:], strict=True)
        own = inputs._replace(
            hidden=states[0],
            head=whole[0],
            targets=targets,
            params=params,
            keys=keys,
            teachers={name: t._replace(hidden=x, head=head) for (name, t), x, head in parts},
            axis=columns and columns[0],
            stored=stored,
        )
        return function(own, *arrays)

    return jax.shard_map(local, in_specs=(places, cells, cells, PartitionSpec()), out_specs=cells)(
        heads, states, (inputs.targets, inputs.keys, inputs.stored, *arrays_BT), inputs.params
    )


def _names(spec: PartitionSpec) -> set[str]:
    """The mesh axes of a spec."""
    return {name for axes in spec if axes for name in ((axes,) if isinstance(axes, str) else axes)}
