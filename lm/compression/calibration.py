"""A model walked through layer by layer on calibration data, for searches on its layers' inputs.

B rows, T tokens, D width, I inputs and O outputs of a matrix.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.interface import Model
from lm.model.parameters import LAYERS
from lm.model.products import project
from lm.model.streams import Group

Batch = dict[str, jax.Array]


def sample_rows(batches: Sequence[Batch], tokens: int) -> Batch:
    """Rows of the batches, evenly taken, that have at least this many tokens; all if they have not.

    As many as the devices that a batch's rows lie on divide.

    Args:
      batches: all of one shape [B, T], with the same arrays.
      tokens: to be taken.
    """
    first = batches[0]["tokens"]
    rows, length = first.shape
    shards = rows // first.sharding.shard_shape(first.shape)[0]
    count = -(-tokens // (length * shards)) * shards
    total = rows * len(batches)
    chosen = np.arange(min(count, total)) * total // min(count, total)

    def take(*parts):
        return jnp.concatenate(parts)[chosen]

    shardings = jax.tree.map(lambda a: a.sharding, batches[0])
    return jax.jit(lambda parts: jax.tree.map(take, *parts), out_shardings=shardings)(list(batches))


@functools.partial(jax.jit, static_argnums=0)
def embed(model: Model, params: Any, batch: Batch) -> jax.Array:
    """The input of the first layer, [B, T, D]."""
    return model.embed(params, batch["tokens"], batch["positions"])


@jax.jit
def layer_at(layers: Any, index: int) -> Any:
    """One layer's part of stacked leaves; the index is data, so that one program serves all."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)


@functools.partial(jax.jit, static_argnums=0)
def inputs_and_output(
    model: Model, layer: Any, x_BTD: jax.Array, batch: Batch, index: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Name -> input of every matrix of a layer, [B, T, I], and the layer's output [B, T, D]."""
    found = {}

    def product(path, inputs_BTI, w_IO, scale):
        del scale
        found[path.removeprefix(f"{LAYERS}/")] = inputs_BTI
        return multiply(inputs_BTI, w_IO)

    output = model.block(layer, x_BTD, batch["positions"], batch["segment_ids"], product, index)
    return found, output


def group_output(
    model: Model,
    layer: Any,
    batch: Batch,
    index: jax.Array | int,
    group: Group,
    inputs_BTI: jax.Array,
    product: Callable[[str, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The output [B, T, O] of `group.result`, without its bias, from the input of the group.

    For use under `jax.jit`, which leaves out what the output does not depend on: all of the layer
    in front of the group, and behind the result.

    Args:
      model: the model that the layer belongs to.
      layer: parameters of the layer.
      batch: positions and segments.
      index: of the layer.
      group: matrices that read the input.
      inputs_BTI: the input.
      product: (name, input, weight) -> output of a matrix of the group, before its bias.
    """
    found = {}

    def any_product(path, x_BTI, w_IO, scale):
        del scale
        name = path.removeprefix(f"{LAYERS}/")
        if name in group.matrices:
            found[name] = product(name, inputs_BTI, w_IO)
        else:
            found[name] = multiply(x_BTI, w_IO)
        return found[name]

    x_BTD = jnp.zeros((*inputs_BTI.shape[:2], model.config.width), inputs_BTI.dtype)
    model.block(layer, x_BTD, batch["positions"], batch["segment_ids"], any_product, index)
    return found[group.result]


def multiply(inputs: jax.Array, weights: jax.Array) -> jax.Array:
    """The product of a layer, in the dtype of the inputs."""
    return project(inputs, weights.astype(inputs.dtype))
