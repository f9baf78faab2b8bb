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


def normed_groups(config: ModelConfig) -> list[Group]:
    """The groups that read a norm.

    Raises:
      InputError: there are none.
    """
    if config.norm_placement == "after":
        raise InputError(
            "model.norm_placement=after has no norm in front of a matrix whose inputs could be "
            "shifted; valid: before, both"
        )
    return [group for group in layer_groups(config) if group.norm]


def scale_inputs(config: ModelConfig, layers: Any, group: Group, s_I: jax.Array) -> Any:
    """The same function with the input of a group divided by s where it is made, and s W.

    It is divided in the gain and the bias of the norm, or in the producer's columns and bias.
    Computed in float32; the dtypes stay.

    Args:
      config: of the model.
      layers: parameters of all layers, stacked, or of one.
      group: with a norm, or with a producer of as many channels as the group has inputs.
      s_I: [I], or [L, I] for stacked layers.
    """

    def times(name, factor):
        leaf = leaf_at(layers, name)
        return (
            {} if leaf is None else {name: (leaf.astype(jnp.float32) * factor).astype(leaf.dtype)}
        )

    if group.norm:
        norm = layers[group.norm]
        changed = {group.norm: with_gain(config, norm, gain(config, norm) / s_I)}
        layers = with_leaves(layers, changed)
        layers = with_leaves(layers, times(f"{group.norm}/bias", 1 / s_I))
    else:
        columns = times(group.producer, 1 / s_I[..., None, :])
        layers = with_leaves(layers, columns | times(bias_of(group.producer), 1 / s_I))
    for name in group.matrices:
        layers = with_leaves(layers, times(name, s_I[..., None]))
    return layers


def shift_norm(layers: Any, group: Group, shift_I: jax.Array) -> Any:
    """Layers in which the group's norm, if it has a bias, gives its output less the shift."""
    name = f"{group.norm}/bias"
    if (bias := leaf_at(layers, name)) is None:
        return layers
    return with_leaves(layers, {name: (bias.astype(jnp.float32) - shift_I).astype(bias.dtype)})


def with_biases(config: ModelConfig, norms: set[str]) -> dict[str, Any]:
    """Keys of the config that change so that these norms, and what reads them, have biases."""
    changes: dict[str, Any] = {}
    if norms and config.norm == "rmsnorm" and not config.norm_bias:
        changes["norm_bias"] = True
    for group in layer_groups(config):
        if group.norm in norms:
            attention = group.result == "attention/output"
            if attention and config.attention_bias == "none":
                changes["attention_bias"] = "qkv"
            if not attention and not config.mlp_bias:
                changes["mlp_bias"] = True
    return changes


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
