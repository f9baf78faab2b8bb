"""Sums and running sums within the numbered pieces of a row, such as answers.

B rows, T tokens, P numbers: P = T, a slot for every number that a piece of a row can have.
"""

import jax
import jax.numpy as jnp
from jax import lax


def sums_by_number(numbers_BT: jax.Array, weights_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """sum(w * x) over the tokens of each number of a row, [B, P] float32.

    A token with w = 0 or a negative number contributes exactly 0 to the sum and to the gradient,
    whatever it holds. On a GPU scattered sums have no fixed order: a repeated run may differ in
    their last bits.

    Args:
      numbers_BT: int32, below T.
      weights_BT: float32.
      values_BT: float32.
    """
    live_BT = (weights_BT != 0) & (numbers_BT >= 0)
    # Both selections: that of the values keeps 0 * NaN out of the derivative of the product.
    values_BT = jnp.where(live_BT, values_BT, 0.0)
    products_BT = jnp.where(live_BT, weights_BT * values_BT, 0.0)
    numbers_BT = jnp.where(live_BT, numbers_BT, 0)
    slots = numbers_BT.shape[1]
    return jax.vmap(lambda x_T, number_T: jax.ops.segment_sum(x_T, number_T, slots))(
        products_BT, numbers_BT
    )


def spread_by_number(numbers_BT: jax.Array, values_BP: jax.Array) -> jax.Array:
    """The value of each token's number, [B, T]; 0 where the number is negative."""
    values_BT = jnp.take_along_axis(values_BP, jnp.maximum(numbers_BT, 0), axis=1)
    return jnp.where(numbers_BT >= 0, values_BT, 0.0)


def running_sums(numbers_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """The sum of x over the tokens of the same number up to and with each token, [B, T].

    Tokens of one number are adjacent.
    """

    def join(a, b):
        (first_a, sum_a), (first_b, sum_b) = a, b
        return first_a | first_b, jnp.where(first_b, sum_b, sum_a + sum_b)

    return lax.associative_scan(join, (firsts(numbers_BT), values_BT), axis=1)[1]


def running_minima(numbers_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
    """The minimum of x over the tokens of the same number up to and with each token, [B, T]."""

    def join(a, b):
        (first_a, low_a), (first_b, low_b) = a, b
        return first_a | first_b, jnp.where(first_b, low_b, jnp.minimum(low_a, low_b))

    return lax.associative_scan(join, (firsts(numbers_BT), values_BT), axis=1)[1]


def firsts(numbers_BT: jax.Array) -> jax.Array:
    """Which tokens have another number than the token before, [B, T] booleans."""
    before_BT = jnp.roll(numbers_BT, 1, axis=1).at[:, 0].set(-2)
    return numbers_BT != before_BT
