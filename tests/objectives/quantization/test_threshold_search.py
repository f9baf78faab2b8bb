"""Outlier Suppression+: shift, scale and threshold against float64, brute force and limit cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.quantization import absmax, activation_quantizer, round_to_nearest
from objectives.quantization.outlier_suppression import (
    channel_range,
    middle,
    search_threshold,
    threshold_scale,
)


def inputs(tokens=40, channels=12, seed=0, largest=60.0):
    """[T, I]: one channel far from zero, one that reaches far, and `largest` the farthest."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, channels))
    x[:, 3] = 30 + 0.5 * x[:, 3]
    x[:, 7] *= largest / np.abs(x[:, 7]).max()
    return x.astype(np.float32)


def test_equivalence_in_float64():
    rng = np.random.default_rng(1)
    x, w, b = inputs().astype(np.float64), rng.normal(size=(12, 5)), rng.normal(size=5)
    found = channel_range(x)
    z = np.asarray(middle(found), np.float64)
    s = np.asarray(threshold_scale(found, middle(found), 2.0), np.float64)
    assert s.max() > 10
    assert z.max() > 20
    got = ((x - z) / s) @ (w * s[:, None]) + b + z @ w
    np.testing.assert_allclose(got, x @ w + b, atol=1e-12)
    assert np.abs(((x - z) / s) @ (w * s[:, None]) + b - (x @ w + b)).max() > 1


@pytest.mark.parametrize("threshold", [1.0, 2.5, 20.0])
def test_all_channels_keep_the_threshold(threshold):
    x = inputs()
    found = channel_range(x)
    z = middle(found)
    s = np.asarray(threshold_scale(found, z, threshold))
    reach = np.abs((x - z) / s).max(0)
    assert (reach <= threshold * (1 + 1e-6)).all()
    np.testing.assert_array_equal(s == 1, np.abs(x - z).max(0) <= threshold)


def test_limits():
    x = inputs()
    x[:, 0] = np.linspace(-2, 2, len(x))
    found = channel_range(x)
    z = middle(found)
    assert z[0] == 0
    assert z[3] > 25
    np.testing.assert_array_equal(threshold_scale(found, z, np.abs(x - z).max()), 1)
    # Without a shift both ends count.
    zero = np.zeros(12, np.float32)
    expected = np.maximum(1, np.maximum(x.max(0) / 2, x.min(0) / -2))
    np.testing.assert_allclose(threshold_scale(found, zero, 2.0), expected, rtol=1e-6)


def test_range_without_padding():
    x = inputs()
    valid = np.arange(len(x)) < 25
    found = channel_range(x, valid)
    np.testing.assert_array_equal(found.low, x[:25].min(0))
    np.testing.assert_array_equal(found.high, x[:25].max(0))
    assert (channel_range(x).high != found.high).any()


def problem(x, z):
    """(loss of a scale, its error by NumPy in float64): six bits for inputs, four for weights."""
    w = np.random.default_rng(2).normal(size=(x.shape[1], 8)).astype(np.float32)
    activation, quantizer = activation_quantizer(6), absmax(bits=4)

    def loss(s):
        got = jnp.matmul(activation((x - z) / s), round_to_nearest(w * s[:, None], quantizer))
        return jnp.square(x @ w - got - z @ w).sum(-1).mean()

    def by_hand(s):
        a, v = (x.astype(np.float64) - z) / s, w.astype(np.float64) * s[:, None]
        scale = np.abs(a).max(1, keepdims=True) / 31
        a = np.round(a / scale) * scale
        scale = np.abs(v).max(0) / 7
        v = np.round(v / scale) * scale
        return np.square(x.astype(np.float64) @ w - a @ v - z @ w.astype(np.float64)).sum(-1).mean()

    return loss, by_hand


@pytest.mark.parametrize("largest", [20.0, 90.0])
def test_search_is_the_best_of_all(largest):
    x = inputs(largest=largest)
    found = channel_range(x)
    z = np.asarray(middle(found))
    loss, by_hand = problem(x, z)
    got = jax.jit(lambda: search_threshold(loss, found, z))()
    most = np.abs(x - z).max()
    assert (most > 50) == (largest > 50)  # more steps than the fewest
    steps = max(100, int(most / 0.5))
    thresholds = most - np.arange(steps + 1) * (most - 1) / steps
    errors = [by_hand(np.asarray(threshold_scale(found, z, t), np.float64)) for t in thresholds]
    best = int(np.argmin(errors))
    assert best > 0
    np.testing.assert_allclose(got.loss, errors[best], rtol=0.02)
    np.testing.assert_allclose(got.first_loss, errors[0], rtol=0.02)
    # Float32 may order two candidates that are as good the other way.
    index = int(np.abs(thresholds - float(got.threshold)).argmin())
    np.testing.assert_allclose(thresholds[index], got.threshold, rtol=1e-4)
    assert errors[index] <= errors[best] * 1.02
    assert got.loss < 0.8 * got.first_loss
    np.testing.assert_allclose(got.scale, threshold_scale(found, z, got.threshold), rtol=1e-6)


def test_few_steps_and_small_inputs():
    x = inputs()
    found = channel_range(x)
    z = middle(found)

    def least_at_ten(s):
        return jnp.abs(s.max() - jnp.abs(x - z).max() / 10)

    two = search_threshold(least_at_ten, found, z, most_steps=2)
    most = float(jnp.abs(x - z).max())
    np.testing.assert_allclose(two.threshold, (most + 1) / 2, rtol=1e-5)
    every = search_threshold(least_at_ten, found, z)
    assert abs(float(every.threshold) - 10) < most / 100
    for small in (x / 1000, 0 * x):
        found = channel_range(small)
        got = search_threshold(lambda s: s.sum(), found, middle(found))
        np.testing.assert_array_equal(got.scale, 1)
        assert got.loss == got.first_loss == 12
