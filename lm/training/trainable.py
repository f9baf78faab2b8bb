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
from lm.model.parameters import parameter_kind, path_of
from lm.model.trained import Trained

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


def split(trained: Trained, trainable: Trainable) -> tuple[Trained, Any]:
    """(what is trained, the parameters that are frozen); scales and the loss are always trained."""

    def part(wanted):
        def keep(keys, leaf):
            return leaf if trainable(path_of(keys)) == wanted else None

        return jax.tree_util.tree_map_with_path(keep, trained.params)

    return trained._replace(params=part(True)), part(False)


def join(live: Trained, frozen: Any) -> Trained:
    """The inverse of `split`."""
    params = jax.tree.map(
        lambda a, b: b if a is None else a, live.params, frozen, is_leaf=lambda x: x is None
    )
    return live._replace(params=params)
