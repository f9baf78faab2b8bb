"""Which parameters a run trains, by `train.trainable`; the others stay as they are.

A tree in two parts has the structure of the whole, with None where the other part has a leaf. None
is an empty tree to JAX: what is frozen has no gradient, no moments and no update.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.errors import InputError
from lm.model.config import check_choice
from lm.model.packed_matrix import FORMATS, is_packed, pack
from lm.model.parameters import parameter_kind, path_of
from lm.model.trained import Trained

# Key -> its value where frozen matrices are packed: the others read or change weights.
_WITHOUT_PACKING = {
    "train.ema_decay": 0,
    "quantization.bits": 16,
    "quantization.widths": "",
    "quantization.activations": "none",
    "quantization.cache": "none",
}

# Path of a parameter -> whether it is trained.
Trainable = Callable[[str], bool]


def make_trainable(config: ConfigDict, shapes: Any) -> Trainable:
    """The rule of `train.trainable` for parameters of these shapes.

    Raises:
      InputError: it is no regular expression, or no parameter is trained.
    """
    rule = config.train.trainable
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise InputError(f"train.trainable={rule!r} is no regular expression: {error}") from None

    def trainable(path: str) -> bool:
        if rule or not config.model.adapter_rank:
            return bool(pattern.search(path))
        return parameter_kind(path) == "adapter"

    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    if not any(map(trainable, paths)):
        what = f"train.trainable={rule!r}" if rule else "model.adapter_matrices"
        raise InputError(f"{what} fits no parameter; they are: {', '.join(sorted(paths))[:300]}")
    return trainable


def make_packing(config: ConfigDict, trainable: Trainable) -> Callable[[Any], Any]:
    """(parameters) -> the same with the frozen matrices of layers packed, by `train.frozen`.

    Matrices that are packed already stay as they are.

    Raises:
      InputError: an unknown format, or one together with what needs the weights themselves.
    """
    kind = config.train.frozen
    check_choice("train.frozen", kind, ("as_is", *FORMATS))
    if kind == "as_is":
        return lambda params: params
    for key, off in _WITHOUT_PACKING.items():
        section, name = key.split(".")
        if config[section][name] != off:
            raise InputError(f"train.frozen={kind} needs {key}={off}: packed weights do not change")

    def packed(keys, leaf):
        path = path_of(keys)
        if is_packed(leaf) or trainable(path) or parameter_kind(path) != "matrix":
            return leaf
        return pack(leaf, kind)

    return lambda params: jax.tree_util.tree_map_with_path(packed, params, is_leaf=is_packed)


def split(trained: Trained, trainable: Trainable) -> tuple[Trained, Any]:
    """(what is trained, the parameters that are frozen); scales and the loss are always trained."""

    def part(wanted):
        def keep(keys, leaf):
            return leaf if trainable(path_of(keys)) == wanted else None

        return jax.tree_util.tree_map_with_path(keep, trained.params, is_leaf=is_packed)

    return trained._replace(params=part(True)), part(False)


def join(live: Trained, frozen: Any) -> Trained:
    """The inverse of `split`."""
    params = jax.tree.map(
        lambda a, b: b if a is None else a,
        live.params,
        frozen,
        is_leaf=lambda x: x is None or is_packed(x),
    )
    return live._replace(params=params)
