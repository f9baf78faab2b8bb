"""Model FLOPs of a training token, and the peak of known accelerators."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lm.model.config import ModelConfig
from lm.model.parameters import is_table, parameter_kind, path_of

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by jax device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def parameters_by_group(shapes: Any) -> dict[str, int]:
    """Number of parameters under each top-level name of a parameter tree."""
    return {name: _count(tree) for name, tree in shapes.items()}


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops_per_token(
    model: ModelConfig,
    shapes: Any,
    sequence_length: int,
    trainable: Callable[[str], bool] = lambda path: True,
) -> int:
    """Model FLOPs of one training token: 6 N + 12 L T M, M channels of all heads.

    N counts the parameters that multiply (all matrices, the table only where it is the head), two
    FLOPs forward and four backward. What is frozen, a head of codes or parameters that `trainable`
    rules out, has no gradient of its own and takes four in all.
    Attention's two products take 12 T M a layer, not halved for causality, as is the custom (arXiv
    2204.02311, appendix B). Recomputation does not count.
    """
    return sum(flops_by_part(model, shapes, sequence_length, trainable).values())


def flops_by_part(
    model: ModelConfig,
    shapes: Any,
    sequence_length: int,
    trainable: Callable[[str], bool] = lambda path: True,
) -> dict[str, int]:
    """The FLOPs of `flops_per_token` by part.

    They are "attention" (its two products, between its projections), "loss" (the head's product)
    and "matrix products" (all others).
    """
    by_path = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    kinds = {path: parameter_kind(path) for path in by_path}
    found = {"matrix products": 0, "attention": 0, "loss": 0}
    for path, leaf in by_path.items():
        if kinds[path] != "vector" and not is_table(path):
            part = "loss" if kinds[path] == "head" else "matrix products"
            found[part] += (6 if trainable(path) else 4) * math.prod(leaf.shape)
    if not model.own_head:
        trained = any(kind == "embedding" and trainable(path) for path, kind in kinds.items())
        found["loss"] += (6 if trained else 4) * model.vocab_size * model.width
    found["attention"] = 12 * model.layers * sequence_length * model.heads * model.head_width
    return found


def peak_flops(configured: float) -> float | None:
    """FLOP/s of all devices together, as configured or as known for their kind."""
    one = configured or PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return one * jax.device_count() if one else None
