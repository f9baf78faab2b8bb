"""Sums within the pieces of a row, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.segments import (
    running_minima,
    running_sums,
    spread_by_number,
    sums_by_number,
)

LENGTH = 7


# Compiled once for all examples, and each alone: what is spread has been rounded already.
SUMS, SPREAD, RUNNING_SUMS, RUNNING_MINIMA = (
    jax.jit(f) for f in (sums_by_number, spread_by_number, running_sums, running_minima)
)


def pieces(lengths):
    """The number of each of `LENGTH` tokens, -1 after the last piece."""
    numbers = np.repeat(np.arange(len(lengths)), lengths)[:LENGTH]
    return np.pad(numbers, (0, LENGTH - len(numbers)), constant_values=-1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=4),
    # The compiled code takes numbers below the normal ones for 0, NumPy does not.
    st.lists(st.floats(-4, 4, width=32, allow_subnormal=False), min_size=LENGTH, max_size=LENGTH),
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
)
def test_sums_and_minima_are_those_of_each_piece(lengths, values, kept):
    numbers, values = pieces(lengths), np.array(values, np.float32)
    weights = np.array(kept, np.float32)
    # What has no weight may hold anything.
    hidden = np.where(weights > 0, values, np.nan)
    arrays = [jnp.asarray(x)[None] for x in (numbers.astype(np.int32), weights, hidden, values)]
    sums_of_row = SUMS(*arrays[:3])
    found = sums_of_row, SPREAD(arrays[0], sums_of_row)
    found += RUNNING_SUMS(arrays[0], arrays[3]), RUNNING_MINIMA(arrays[0], arrays[3])
    sums, spread, so_far, lowest = (np.asarray(x)[0] for x in found)
    for number in range(LENGTH):
        own = (numbers == number) & (weights > 0)
        np.testing.assert_allclose(sums[number], values[own].sum(), rtol=1e-5, atol=1e-5)
    for place in range(LENGTH):
        number = numbers[place]
        np.testing.assert_array_equal(spread[place], sums[number] if number >= 0 else 0)
        before = values[: place + 1][numbers[: place + 1] == number]
        np.testing.assert_allclose(so_far[place], before.sum(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(lowest[place], before.min())


def test_no_gradient_passes_through_what_does_not_count():
    numbers, weights = jnp.array([[0, 0, 1, -1]]), jnp.array([[2.0, 0.0, 1.0, 1.0]])
    values = jnp.array([[1.0, jnp.nan, 3.0, jnp.inf]])
    slopes = jax.grad(lambda x: jnp.sum(sums_by_number(numbers, weights, x)))(values)
    np.testing.assert_array_equal(slopes, [[2, 0, 1, 0]])
