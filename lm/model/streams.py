"""Which norm's output each matrix reads, and who reads and writes the residual stream.

For changes of a trained model that leave its function as it is: the one place outside the modules
that says what a matrix's inputs are made of. D width, M channels of all heads, F MLP width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.layers import GATES
from lm.model.packed_matrix import is_packed

# The norm in front of the head, and the matrices that add to the residual stream in every layer.
FINAL_NORM = "final_norm"
WRITERS = ("attention/output", "mlp/down")

# The matrices whose outputs are compared with each other, not summed.
SCORE_MATRICES = ("attention/query", "attention/key")

# Path of the matrix of an input interface whose rows are in the basis of the residual stream.
_INTERFACES = {
    "learned": "embedding/table",
    "learned_low_rank": "embedding/projection",
    "projected": "embedding/projection",
}


class Group(NamedTuple):
    """Matrices of a layer that multiply the same input, and what that input is made by.

    Attributes:
      matrices: names such as "attention/query" in the tree of a layer.
      norm: the norm whose output they read, such as "attention_norm"; "" where it is no norm's.
      producer: the matrix whose output channels, with its bias, the inputs are proportional to,
        channel by channel: "mlp/up" for the input of a gated MLP's "mlp/down", and
        "attention/value" for that of "attention/output", which has its channels once for every
        group of query heads. "" where there is none: inputs from a norm, or through the activation
        of an MLP without a gate.
      result: the matrix at whose output the group's error counts: that of its sub-block for those
        behind a norm, the matrix itself for the others.
    """

    matrices: tuple[str, ...]
    norm: str
    producer: str
    result: str


def layer_groups(config: ModelConfig) -> tuple[Group, ...]:
    """The groups of a layer's matrices in the order of the forward pass.

    With `model.norm_placement` "after" no norm stands in front of a matrix: query, key, value, up
    and gate read the residual stream itself.
    """
    gated = config.activation in GATES
    before = config.norm_placement != "after"
    up = ("mlp/up", "mlp/gate") if gated else ("mlp/up",)
    norms = ("attention_norm", "mlp_norm") if before else ("", "")
    return (
        Group(
            ("attention/query", "attention/key", "attention/value"),
            norms[0],
            "",
            "attention/output",
        ),
        Group(("attention/output",), "", "attention/value", "attention/output"),
        Group(up, norms[1], "", "mlp/down"),
        Group(("mlp/down",), "", "mlp/up" if gated else "", "mlp/down"),
    )


def bias_of(name: str) -> str:
    """Name of the bias behind a matrix, which exists where the config says so."""
    return f"{name}_bias"


def residual_embeddings(config: ModelConfig) -> tuple[str, ...]:
    """Paths of the matrices [..., D] whose rows the input of the first layer is summed from.

    Raises:
      InputError: an interface that has none, because its vectors are no parameters.
    """
    if config.embedding not in _INTERFACES:
        raise InputError(
            f"model.embedding={config.embedding} has no matrix that can be rotated; valid: "
            f"{', '.join(_INTERFACES)}"
        )
    positions = ("positions/table",) if config.positions == "learned" else ()
    return (_INTERFACES[config.embedding], *positions)


def gain(config: ModelConfig, norm: Any) -> jax.Array:
    """What a norm multiplies by, float32 [..., D]: what is stored plus `model.norm_offset`."""
    return norm["scale"].astype(jnp.float32) + config.norm_offset


def with_gain(config: ModelConfig, norm: Any, gain_D: jax.Array) -> Any:
    """A norm's parameters with another gain, stored in the dtype of the old one."""
    return {**norm, "scale": (gain_D - config.norm_offset).astype(norm["scale"].dtype)}


def divide_channels(config: ModelConfig, layers: Any, group: Group, by_I: jax.Array) -> Any:
    """Layers in which the input of a group is divided, channel by channel, where it is made.

    By the gain and the bias of its norm, or by the producing matrix's columns and bias. The dtypes
    stay; the group's own matrices are not touched.

    Args:
      config: of the model.
      layers: parameters of all layers, stacked, or of one.
      group: with a norm, or with a producer of as many channels as the group has inputs.
      by_I: [I], or [L, I] for stacked layers.
    """

    def divided(array, by):
        return (array.astype(jnp.float32) / by).astype(array.dtype)

    if group.norm:
        norm = layers[group.norm]
        norm = with_gain(config, norm, gain(config, norm) / by_I)
        if "bias" in norm:
            norm["bias"] = divided(norm["bias"], by_I)
        return {**layers, group.norm: norm}
    changed = {group.producer: divided(leaf_at(layers, group.producer), by_I[..., None, :])}
    bias = bias_of(group.producer)
    if (stored := leaf_at(layers, bias)) is not None:
        changed[bias] = divided(stored, by_I)
    return with_leaves(layers, changed)


def check_changeable(config: ModelConfig, params: Any, action: str) -> None:
    """InputError where the matrices are not plain arrays that are the whole of a product.

    Args:
      config: of the model.
      params: its parameters.
      action: what is to be done, such as "rotating", for the message.
    """
    if config.adapter_rank:
        raise InputError(
            f"model.adapter_rank={config.adapter_rank}: {action} needs plain matrices; merge the "
            "adapters first (model.adapter_rank=0)"
        )
    if any(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed))):
        raise InputError(f"train.frozen: {action} needs plain matrices; valid: as_is")


def leaf_at(tree: Any, name: str) -> Any:
    """The leaf or part of nested dictionaries at a name such as "mlp/up"; None if there is none."""
    for key in name.split("/"):
        tree = None if tree is None else tree.get(key)
    return tree


def with_leaves(tree: Any, leaves: dict[str, Any]) -> Any:
    """Nested dictionaries with the leaves or parts at these names put in or replaced."""
    for name, leaf in leaves.items():
        key, _, rest = name.partition("/")
        part = with_leaves(tree.get(key, {}), {rest: leaf}) if rest else leaf
        tree = {**tree, key: part}
    return tree
