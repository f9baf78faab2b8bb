"""Quantization-aware training over a parameter tree: rules say which leaf is quantized, and how.

Rules are a function from a leaf's path ("layers/mlp/up") to its quantizer, or to None for a leaf
that stays as it is. They raise ValueError for a path that they do not know, so that nothing stays
in full precision because it was forgotten. This module knows no parameter names: the caller's rules
do.

All functions are pure. They take whole trees with stacked leaves [L, in, out] or, with `prefix`,
the part of one layer inside the scan over layers, under any sharding.

A tree of scales has the structure of the parameters. In place of each leaf it has a learned scale,
float32 with the same number of axes as the weights (each axis of the weights' length, the number of
groups, or 1), or () where nothing is learned.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from objectives.quantization.base import Quantizer
from objectives.quantization.learned_scale import paretoq

Rules = Callable[[str], Quantizer | None]

# The embedding and the head are not narrower (arXiv 2509.22935, setup; from a summary).
OUTER_BITS = 4.0


def default_quantizers(
    bits: float,
    quantizer: Callable[..., Quantizer | None] = paretoq,
    *,
    outer_bits: float = OUTER_BITS,
    **layout,
) -> dict[str, Quantizer | None]:
    """Quantizers by kind of parameter: layers at `bits`, the rest at max(bits, `outer_bits`).

    An embedding [V, D] has one scale per row, that is per token: a lookup reads a row, and a row is
    an output channel where the table is also the head. How the paper scales embeddings is
    unconfirmed. What has 16 bits or more is not quantized, with any `quantizer`.

    Args:
      bits: width of the matrices in the layers.
      outer_bits: least width of the embedding and of the head.
      quantizer: a factory that takes bits, granularity, group_size and contraction_axis.
      **layout: granularity and group_size, given to every quantizer.

    Returns:
      "matrix", "embedding", "head", and "vector" and "adapter", which are never quantized ->
      quantizer or None.

    Raises:
      ValueError: a width or a layout that the quantizer does not have.
    """

    def make(width, **options):
        width = int(width) if width == int(width) else width  # a config has 4.0
        return None if width >= 16 else quantizer(bits=width, **layout, **options)

    outer = max(bits, outer_bits)
    return {
        "matrix": make(bits),
        "embedding": make(outer, contraction_axis=-1),
        "head": make(outer),
        "vector": None,
        "adapter": None,
    }


def _map(function, rules, prefix, tree, *rest):
    """function(quantizer or None, leaf, ...) of every leaf of `tree`."""

    def at_leaf(path, *leaves):
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            return function(rules(name), *leaves)
        except ValueError as error:
            # A quantizer does not know the path of its weights: add it to the message.
            message = str(error)
            raise ValueError(message if name in message else f"{name}: {message}") from None

    return jax.tree_util.tree_map_with_path(at_leaf, tree, *rest)


def init_scales(params: Any, rules: Rules, prefix: str = "") -> Any:
    """The tree of first scales, computed from the weights; () where nothing is learned.

    Args:
      params: the parameters, or the part of them under `prefix`.
      rules: path -> quantizer or None, see the module.
      prefix: such as "layers/"; put before every path.

    Raises:
      ValueError: the rules do not know a leaf, or a shape does not fit its quantizer.
    """

    def first(quantizer, weights):
        return () if quantizer is None else quantizer.init(weights)

    return _map(first, rules, prefix, params)


def quantize_tree(params: Any, scales: Any, rules: Rules, prefix: str = "") -> Any:
    """The parameters with every leaf on its grid; differentiable in `params` and in `scales`.

    Inside a scan over layers it takes the slices of one layer, which saves a second copy of the
    whole model. The result equals the corresponding slice of the stacked call.

    Args:
      params: the parameters, or the part of them under `prefix`.
      scales: of `init_scales`, for the same part.
      rules: the same as for `init_scales`.
      prefix: such as "layers/"; put before every path.

    Raises:
      ValueError: as `init_scales`.
    """

    def at_leaf(quantizer, weights, scale):
        return weights if quantizer is None else quantizer.quantize(weights, scale)

    return _map(at_leaf, rules, prefix, params, scales)


def quantization_error(params: Any, scales: Any, rules: Rules) -> dict[str, jax.Array]:
    """|w - w_q|^2 / |w|^2 of every quantized matrix, by path; float32, [L] for stacked leaves.

    It is 0 for a matrix of zeros that is quantized to zeros.
    """

    def at_leaf(quantizer, weights, scale):
        w = weights.astype(jnp.float32)
        error = w - quantizer.quantize(weights, scale).astype(jnp.float32)
        size = jnp.square(w).sum((-2, -1))
        return jnp.square(error).sum((-2, -1)) / jnp.where(size > 0, size, 1.0)

    return _by_path(at_leaf, params, scales, rules)


def outside_clip_range(params: Any, scales: Any, rules: Rules) -> dict[str, jax.Array]:
    """Share of the weights outside of the clip range, by path; float32, [L] for stacked leaves.

    With learned scales these weights get no gradient. With scales from the data they are the
    weights beyond the largest level of a block float (with integers there are none).
    """

    def at_leaf(quantizer, weights, scale):
        return 1.0 - quantizer.inside(weights, scale).mean((-2, -1), dtype=jnp.float32)

    return _by_path(at_leaf, params, scales, rules)


def _by_path(function, params, scales, rules) -> dict[str, jax.Array]:
    found = {}

    def at_leaf(path, weights, scale):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        quantizer = rules(name)
        if quantizer is not None:
            found[name] = function(quantizer, weights, scale)

    jax.tree_util.tree_map_with_path(at_leaf, params, scales)
    return found
