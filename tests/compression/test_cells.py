"""Weights in the cells of given codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.compression.cells import into_cells
from lm.compression.packed import Coded
from objectives.quantization import QUANTIZERS, Mixed

CASES = [("lsq", 4), ("paretoq", 2), ("ternary", 1.58), ("learned_range", 3)]
CASES += [("elastic_binary", 1), ("seq", 2)]


def coded_and_weights(quantizer, shape, dtype="float32"):
    """Codes of other weights than those that are given, as a method such as GPTQ makes them."""
    key, other = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(key, shape)
    scale = quantizer.init(weights)
    moved = weights + 0.3 * jax.random.normal(other, shape)
    grid = quantizer.grid(moved, scale)
    coded = Coded(quantizer, quantizer.encode(moved, grid), grid, jnp.dtype(dtype))
    return coded, weights.astype(dtype), scale


@pytest.mark.parametrize(("name", "bits"), CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_codes_and_are_nearer_to_what_they_were(name, bits, dtype):
    quantizer = QUANTIZERS[name](bits=bits, granularity="group", group_size=8)
    coded, weights, scale = coded_and_weights(quantizer, (32, 16), dtype)
    found = into_cells(weights, coded)
    assert found.dtype == weights.dtype
    np.testing.assert_array_equal(quantizer.encode(found, coded.grid), coded.codes)
    np.testing.assert_allclose(
        quantizer.quantize(found.astype(jnp.float32), scale), coded.decode(), rtol=1e-2, atol=1e-6
    )
    before, after = (np.abs(np.float32(x) - np.float32(weights)) for x in (coded.decode(), found))
    assert np.all(after <= before + 1e-6)
    inside = np.array(quantizer.encode(weights, coded.grid) == coded.codes)
    inside &= np.asarray(quantizer.inside(weights, quantizer.of_grid(coded.grid)))
    assert 0.2 < inside.mean() < 1  # Negative control: others have other codes.
    np.testing.assert_array_equal(found[inside], weights[inside])
    assert after.mean() < 0.6 * before.mean()


def test_the_last_point_before_the_border_by_hand():
    """Steps of 1: a weight of 2.3 with the code of 1 ends at 1.5, one of 1.2 where it is."""
    quantizer = QUANTIZERS["lsq"](bits=4, granularity="channel")
    weights, values = jnp.array([[2.3], [1.2], [-9.0]]), jnp.array([[1.0], [1.0], [-8.0]])
    grid = quantizer.grid(values, jnp.ones((1, 1)))
    coded = Coded(quantizer, quantizer.encode(values, grid), grid, jnp.dtype("float32"))
    found = np.asarray(into_cells(weights, coded))[:, 0]
    assert 1.5 - 1.3 / 256 <= found[0] <= 1.5
    assert found[1] == np.float32(1.2)
    assert found[2] == -8  # No gradient would reach it further out.


def test_layers_of_several_widths_are_treated_one_by_one():
    four, two = (QUANTIZERS["lsq"](bits=b, granularity="channel") for b in (4, 3))
    parts = [coded_and_weights(quantizer, (8, 4)) for quantizer in (four, two)]
    codes = jnp.stack([coded.codes for coded, *_ in parts])
    grid = jax.tree.map(lambda *x: jnp.stack(x), *(coded.grid for coded, *_ in parts))
    both = Coded(Mixed((four, two), (0, 1)), codes, grid, jnp.dtype("float32"))
    weights = jnp.stack([one for _, one, _ in parts])
    expected = jnp.stack([into_cells(one, coded) for coded, one, _ in parts])
    np.testing.assert_array_equal(into_cells(weights, both), expected)
