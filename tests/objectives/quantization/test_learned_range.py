"""A learned range: it starts as minmax, and its gradients are those written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives.quantization import learned_range, minmax
from objectives.quantization.learned_range import Range

LAYOUTS = [
    {},
    {"granularity": "tensor"},
    {"granularity": "group", "group_size": 8},
    {"contraction_axis": -1},
]


def weights(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 16, 6)), jnp.float32)


@pytest.mark.parametrize("layout", tiny.mostly_slow(LAYOUTS, LAYOUTS[:2]), ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_starts_as_minmax(bits, layout):
    w, quantizer = weights(), learned_range(bits, **layout)
    ends = quantizer.init(w)
    expected = minmax(bits, **layout).quantize(w, ())
    np.testing.assert_allclose(quantizer.quantize(w, ends), expected, rtol=1e-5, atol=1e-6)
    assert quantizer.inside(w, ends).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_are_what_is_trained_and_a_grid_gives_its_range_back(layout):
    w, quantizer = weights(), learned_range(3, **layout)
    ends = jax.tree.map(lambda x: 0.6 * x, quantizer.init(w))
    grid = quantizer.grid(w, ends)
    on_grid = quantizer.quantize(w, ends)
    decoded = quantizer.decode(quantizer.encode(w, grid), grid)
    np.testing.assert_allclose(on_grid, decoded, rtol=1e-6, atol=1e-7)
    again = quantizer.grid(w, quantizer.of_grid(grid))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, grid)
    share = 1 - np.asarray(quantizer.inside(w, ends)).mean()
    assert 0.01 < share < 0.5


def by_hand(w, low, high, bits):
    """(quantized, slopes in the weight, in low and in high) of one block in float64."""
    top = 2**bits - 1
    scale = (high - low) / top
    zero = np.round(-low / scale)
    code, rest = np.round(w / scale) + zero, zero + low / scale
    below, above = code < 0, code > top
    inside = (np.round(w / scale) - w / scale) / top
    to_low = np.select([below, above], [1 + rest / top, rest / top], -inside)
    to_high = np.select([below, above], [-rest / top, 1 - rest / top], inside)
    quantized = scale * (np.clip(code, 0, top) - zero)
    return quantized, (~below & ~above).astype(float), to_low, to_high


def test_gradients_are_those_of_straight_through_rounding():
    w, quantizer = weights()[0], learned_range(3)
    ends = Range(*(0.7 * x for x in quantizer.init(w)))
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(w.shape), jnp.float32)
    quantized, pull_back = jax.vjp(quantizer.quantize, w, ends)
    to_w, to_ends = pull_back(cotangent)
    factor = 1 / np.sqrt(w.size * 7)
    expected = [
        by_hand(np.float64(w[:, o]), float(ends.low[0, o]), float(ends.high[0, o]), 3)
        for o in range(w.shape[1])
    ]
    on_grid, slope, low, high = (np.stack(x, -1) for x in zip(*expected, strict=True))
    np.testing.assert_allclose(quantized, on_grid, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_w, slope * cotangent, rtol=1e-5)
    np.testing.assert_allclose(to_ends.low[0], factor * (low * cotangent).sum(0), rtol=1e-4)
    np.testing.assert_allclose(to_ends.high[0], factor * (high * cotangent).sum(0), rtol=1e-4)


def test_a_trained_range_is_better_than_that_of_the_largest_weights():
    w = jnp.asarray(np.random.default_rng(2).standard_t(3, (64, 4)), jnp.float32)
    quantizer = learned_range(2)
    ends = first = quantizer.init(w)

    @jax.jit
    def step(ends):
        def loss(ends):
            return jnp.square(quantizer.quantize(w, ends) - w).mean()

        value, gradient = jax.value_and_grad(loss)(ends)
        return value, jax.tree.map(lambda x, g: x - 0.02 * jnp.sign(g), ends, gradient)

    values = []
    for _ in range(200):
        value, ends = step(ends)
        values.append(float(value))
    assert min(values) < 0.85 * values[0]
    assert np.abs(ends.high - first.high).max() > 0.1
