"""Hadamard matrices against their definition."""

import jax
import numpy as np
import pytest
import scipy.linalg

from objectives.quantization.hadamard import hadamard, randomized_hadamard

# Multiples of 4 up to 128 that need a prime power, or neither of the constructions.
MISSING = (52, 92, 100, 116)
ORDERS = [1, 2, *(n for n in range(4, 129, 4) if n not in MISSING)]


@pytest.mark.parametrize("n", [*ORDERS, 576, 896, 1536])
def test_definition(n):
    h = hadamard(n)
    assert h.shape == (n, n)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


def test_powers_of_two_are_sylvester():
    np.testing.assert_array_equal(hadamard(64), scipy.linalg.hadamard(64))


@pytest.mark.parametrize("n", [*MISSING, 0, -4, 3, 6, 18, 130])
def test_refuses(n):
    with pytest.raises(ValueError, match=f"order {n} "):
        hadamard(n)


def test_randomized():
    one, other = (np.asarray(randomized_hadamard(36, jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_allclose(one @ one.T, np.eye(36), atol=1e-6)
    assert (one != other).any()
    # Equal channels, which the plain matrix of a power of two gathers in one, are spread out.
    mixed = np.ones(64) @ randomized_hadamard(64, jax.random.key(0))
    assert abs(np.ones(64) @ hadamard(64) / 8).max() == 8
    assert abs(mixed).max() < 4
