"""The names of the parameters, known to this folder alone; everyone else asks for a kind.

A parameter's path is its keys joined by slashes, such as "layers/mlp/up". The parameters of all
layers are stacked on a leading axis under `LAYERS`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

from lm.errors import InputError

KINDS = ("matrix", "embedding", "head", "vector", "adapter")

# Top-level names of the parameters of all layers, and of a head of its own with its one matrix.
LAYERS = "layers"
HEAD = "head"
HEAD_MATRIX = "head/kernel"

# The matrices that give a layer's values, and that take the outputs of its attention.
VALUE = "layers/attention/value"
ATTENTION_OUTPUT = "layers/attention/output"

# Matrices of one layer; those of one group multiply the same input. A forward pass reads the groups
# in this order.
MATRICES_BY_INPUT = (
    ("attention/query", "attention/key", "attention/value"),
    ("attention/output",),
    ("mlp/up", "mlp/gate"),
    ("mlp/down",),
)

_MATRICES = frozenset(f"{LAYERS}/{name}" for group in MATRICES_BY_INPUT for name in group)

# The first rule that holds for a path decides its kind.
_RULES: tuple[tuple[Callable[[str], Any], str], ...] = (
    (re.compile(r"(^|/)(scale|bias|[a-z]+_bias)$").search, "vector"),
    (re.compile(r"^(embedding|positions)/").search, "embedding"),
    (re.compile(r"^head/").search, "head"),
    (_MATRICES.__contains__, "matrix"),
    (re.compile(r"_adapter_(in|out)$").search, "adapter"),
)


def path_of(keys: Any) -> str:
    """The path of a leaf from the keys that `jax.tree_util` gives for it."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def parameter_kind(path: str) -> str:
    """The kind of a parameter, one of `KINDS`.

    A "matrix" is a projection of the attention or the MLP, [L, in, out]. "embedding" is everything
    trained in the input interface, learned positions included, "head" an output matrix of its own
    [D, V], "vector" a norm's scale, or a bias, "adapter" a
    factor of a low-rank change of a matrix, [L, in, r] or [L, r, out].

    Args:
      path: such as "layers/mlp/up".

    Raises:
      InputError: no rule covers the path.
    """
    for holds, kind in _RULES:
        if holds(path):
            return kind
    raise InputError(
        f"parameter {path} is of no known kind; add a rule to lm/model/parameters.py that says "
        "whether it is a matrix, part of the embedding, the head, or a vector"
    )


def parameter_kinds(params: Any) -> Any:
    """A tree like `params` with the kind of every leaf, see `parameter_kind`.

    Raises:
      InputError: no rule covers a leaf.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, _: parameter_kind(path_of(keys)), params)


def is_table(path: str) -> bool:
    """Whether the input interface reads single rows of this parameter and never multiplies it."""
    return path in ("embedding/table", "positions/table")


def layer_matrices(layers: Any) -> list[str]:
    """Names such as "mlp/up" of the matrices in a tree of layers, in the order of the forward pass.

    Args:
      layers: the parameters under `LAYERS`, or those of one layer.

    Raises:
      InputError: a leaf of no known kind.
    """
    names = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(layers)}
    matrices = {name for name in names if parameter_kind(f"{LAYERS}/{name}") == "matrix"}
    return [name for group in MATRICES_BY_INPUT for name in group if name in matrices]
