"""The summands of what is minimised, each with a denominator of its own.

B batch, T length.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Term(NamedTuple):
    """One summand of what is minimised: coefficient * sum / denominator.

    Sums of micro-batches and devices are added, and divided once by the denominator of the whole
    global, accumulated batch. (A mean of the means of micro-batches is another loss as soon as
    their weights differ.)

    Attributes:
      sum: float32 scalar, over the tokens at hand.
      denominator: float32 scalar of the whole batch, a constant to gradients. Where it is 0, as in
        a batch without any weight, the term is its sum, 0.
      coefficient: a Python number; at 0 the term is reported and not minimised.
    """

    sum: jax.Array
    denominator: jax.Array
    coefficient: float = 1.0


def minimise(terms: Mapping[str, Term]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar sum_k coefficient_k * sum_k / denominator_k, and each quotient by name.

    Given the denominators of the whole batch, the values and gradients of micro-batches add up to
    those of the batch.

    Raises:
      ValueError: no term has a coefficient.
    """
    values = {
        name: term.sum / jnp.where(term.denominator != 0, term.denominator, 1.0)
        for name, term in terms.items()
    }
    scaled = [
        values[name] if term.coefficient == 1 else term.coefficient * values[name]
        for name, term in terms.items()
        if term.coefficient
    ]
    if not scaled:
        raise ValueError(f"no term to minimise among: {', '.join(terms) or 'none'}")
    return sum(scaled[1:], scaled[0]), values


def times(factors_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """factor * x, with factors that carry no gradient; NaN where the factor is not finite.

    Through such a NaN no gradient passes, where that of a product would be 0 * NaN.
    """
    factors_BT = jax.lax.stop_gradient(factors_BT)
    finite_BT = jnp.isfinite(factors_BT)
    return jnp.where(finite_BT, jnp.where(finite_BT, factors_BT, 0.0) * values_BT, jnp.nan)


def masked_sum(weights_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """sum(w * x) over tokens with w != 0, so that 0 * NaN is 0 and passes no gradient."""
    return jnp.sum(jnp.where(weights_BT != 0, weights_BT * values_BT, 0.0))
