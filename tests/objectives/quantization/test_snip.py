"""The reconstruction of SNIP's divergences against NumPy in float64 and finite differences."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives.quantization.snip import adamw_jacobian, loss_divergence, weight_divergence


def update(g, m, v, t, rate, b1, b2, eps):
    """AdamW's update by its definition."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize("step", [1, 3, 1000, np.inf])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-8])
def test_the_jacobian_is_that_of_one_update(step, epsilon):
    rng = np.random.default_rng(0)
    g, m = rng.normal(size=(2, 50))
    v = rng.random(50) + 0.1
    if step == 1:
        m, v = 0 * m, 0 * v
    options = (0.1, 0.9, 0.95, epsilon)
    h = 1e-6
    expected = (update(g + h, m, v, step, *options) - update(g - h, m, v, step, *options)) / (2 * h)
    named = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": epsilon}
    arrays = [jnp.asarray(x, jnp.float32) for x in (g, m, v)]
    found = adamw_jacobian(*arrays, step, **named)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=3e-6)
    # Negative control: another momentum has another slope.
    other = adamw_jacobian(*arrays, step, **named | {"beta1": 0.5})
    assert step == 1 or np.abs(other - expected).max() > 0.01


def test_it_is_optax_that_the_update_is_of():
    g, h = np.linspace(-1, 1, 8), 1e-2
    optimizer = optax.adamw(0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.0)
    params = jnp.zeros(8)
    _, state = optimizer.update(jnp.asarray(g[::-1] + 0.3), optimizer.init(params), params)
    up, down = (
        -optimizer.update(jnp.asarray(g + d, jnp.float32), state, params)[0] for d in (h, -h)
    )
    found = adamw_jacobian(
        jnp.asarray(g),
        *state[0][1:3],
        state[0].count + 1,
        learning_rate=0.1,
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
    )
    np.testing.assert_allclose(found, (up - down) / (2 * h), rtol=0.02, atol=2e-4)


def test_a_gradient_that_never_was_has_the_slope_of_momentum_alone():
    zero = jnp.zeros(3)
    found = adamw_jacobian(zero, zero, zero, 1, beta1=0.9, epsilon=0.5)
    np.testing.assert_allclose(found, 2.0, rtol=1e-6)


def test_the_loss_divergence_is_the_size_of_a_random_product():
    """E |<g, d>| of errors of random direction, over many draws."""
    rng = np.random.default_rng(1)
    g = rng.normal(size=64)
    d = rng.normal(size=(20000, 64))
    d *= 3 / np.linalg.norm(d, axis=1, keepdims=True)
    measured = np.abs(d @ g).mean()
    found = loss_divergence(jnp.float32(np.linalg.norm(g)), jnp.float32(3.0), 64, jnp.float32(2.0))
    np.testing.assert_allclose(found, measured / np.sqrt(2 / np.pi) / 2, rtol=0.02)


def test_the_weight_divergence_by_hand():
    found = weight_divergence(
        jnp.array([[1.0, 2.0, 5.0]]), jnp.array([[2.0, 8.0, 0.0]]), jnp.array([4.0]), jnp.array([6])
    )
    np.testing.assert_allclose(found, [(0.5 + 0.25) * 6 / 4])
