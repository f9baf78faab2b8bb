"""Quantization-aware training over a parameter tree: rules say which leaf is quantized, and how.

A rule is (regular expression, quantizer or None); the first whose expression is found in a leaf's
path ("layers/mlp/up") decides, as in the optimizer's groups. None leaves it as it is. A leaf
that no rule covers is an error: nothing stays in full precision because it was forgotten.

Everything here is pure, takes whole trees with stacked leaves [L, in, out] or, with `prefix`, the
part of one layer inside the scan over layers, and is indifferent to shardings.

A tree of scales has the structure of the parameters, with a learned scale (float32, as many axes as
its weights, each of their length, the number of groups, or 1) or () in place of each leaf.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from objectives.quantization.base import Quantizer
from objectives.quantization.learned_scale import paretoq

Rules = Sequence[tuple[str, Quantizer | None]]

# The embedding and the head are never narrower (arXiv 2509.22935, setup; from a summary).
OUTER_BITS = 4


def default_rules(
    bits: float, quantizer: Callable[..., Quantizer | None] = paretoq, **layout
) -> Rules:
    """Layers at `bits`, embedding and head at max(bits, 4), norms never.

    The embedding [V, D] has its scales by row, one a token: what a lookup reads, and an output
    channel where the table is the head, too. How the paper scales embeddings is unconfirmed:
    replace that rule for another way. From 16 bits on nothing is quantized, whatever `quantizer`.

    Args:
      bits: width of the matrices in the layers.
      quantizer: a factory that takes bits, granularity, group_size and contraction_axis.
      **layout: granularity and group_size, given to every quantizer.
    """

    def make(width, **options):
        width = int(width) if width == int(width) else width  # a config has 4.0
        return None if width >= 16 else quantizer(bits=width, **layout, **options)

    outer = max(bits, OUTER_BITS)
    return (
        (r"(^|/)(scale|bias)$", None),
        (r"^embedding/", make(outer, contraction_axis=-1)),
        (r"^head/", make(outer)),
        (r"^layers/.*/(query|key|value|output|up|gate|down)$", make(bits)),
    )


def rule_of(path: str, rules: Rules) -> Quantizer | None:
    """The quantizer of the parameter at `path`, None for none.

    Raises:
      ValueError: no rule covers it.
    """
    for expression, quantizer in rules:
        if re.search(expression, path):
            return quantizer
    raise ValueError(f"parameter {path} is covered by no quantization rule; add one (or None)")


def _map(function, rules, prefix, tree, *rest):
    """Leaf by leaf: function(quantizer, leaf, ...) of the quantized ones; see the callers."""

    def at_leaf(path, *leaves):
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            return function(rule_of(name, rules), *leaves)
        except ValueError as error:
            # Of all leaves, which? Quantizers do not know the name of what they are given.
            message = str(error)
            raise ValueError(message if name in message else f"{name}: {message}") from None

    return jax.tree_util.tree_map_with_path(at_leaf, tree, *rest)


def init_scales(params: Any, rules: Rules, prefix: str = "") -> Any:
    """The tree of scales from the weights as they are now; () where nothing is learned.

    Args:
      params: the parameters, or the part of them whose paths begin with `prefix`.
      rules: see the module.
      prefix: such as "layers/"; put before every path.

    Raises:
      ValueError: a leaf that no rule covers, or whose shape does not fit its quantizer.
    """

    def first(quantizer, weights):
        return () if quantizer is None else quantizer.init(weights)

    return _map(first, rules, prefix, params)


def quantize_tree(params: Any, scales: Any, rules: Rules, prefix: str = "") -> Any:
    """The parameters with every leaf on its grid; differentiable in `params` and in `scales`.

    Inside a scan over layers it takes the slices of one layer, so that no second copy of the whole
    model comes into being; its result is then that of the stacked call, slice by slice.

    Args:
      params: the parameters, or the part of them whose paths begin with `prefix`.
      scales: of `init_scales`, for the same part.
      rules: the same as there.
      prefix: such as "layers/"; put before every path.

    Raises:
      ValueError: as `init_scales`.
    """

    def at_leaf(quantizer, weights, scale):
        return weights if quantizer is None else quantizer.quantize(weights, scale)

    return _map(at_leaf, rules, prefix, params, scales)


def quantization_error(params: Any, scales: Any, rules: Rules) -> dict[str, jax.Array]:
    """|w - w_q|^2 / |w|^2 of every quantized matrix, by path; float32 [L] for stacked leaves.

    0 for a matrix of zeros that stays so.
    """

    def at_leaf(quantizer, weights, scale):
        w = weights.astype(jnp.float32)
        error = w - quantizer.quantize(weights, scale).astype(jnp.float32)
        size = jnp.square(w).sum((-2, -1))
        return jnp.square(error).sum((-2, -1)) / jnp.where(size > 0, size, 1.0)

    return _by_path(at_leaf, params, scales, rules)


def outside_clip_range(params: Any, scales: Any, rules: Rules) -> dict[str, jax.Array]:
    """Share of the weights outside of the clip range, by path; float32 [L] for stacked leaves.

    For learned scales, the weights that get no gradient; for scales from the data, the weights
    beyond the largest level of a block float (integers have none by construction).
    """

    def at_leaf(quantizer, weights, scale):
        return 1.0 - quantizer.inside(weights, scale).mean((-2, -1), dtype=jnp.float32)

    return _by_path(at_leaf, params, scales, rules)


def _by_path(function, params, scales, rules) -> dict[str, jax.Array]:
    found = {}

    def at_leaf(path, weights, scale):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        quantizer = rule_of(name, rules)
        if quantizer is not None:
            found[name] = function(quantizer, weights, scale)

    jax.tree_util.tree_map_with_path(at_leaf, params, scales)
    return found
