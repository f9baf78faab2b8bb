"""Quantization-aware integrated gradients: the checks of the sheet, and both of its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.quantization.qig import (
    integrated_gradients,
    quantization_gradients,
    token_importance,
)

RNG = np.random.default_rng(0)
W, W_Q, X, X_Q = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(4, 6, 6)))


def block(x):
    return jnp.tanh(x @ W)


def block_q(x):
    return jnp.tanh(x @ (W + 0.1 * W_Q))


def test_attributions_sum_to_the_difference_of_a_smooth_block():
    def function(x):
        return jnp.square(block(x)).sum()

    whole = function(X) - function(X_Q)
    found = integrated_gradients(function, X, X_Q, 256, "trapezoid").sum()
    np.testing.assert_allclose(found, whole, rtol=0.01)
    # Negative control: two points do not do it.
    assert abs(integrated_gradients(function, X, X_Q, 2, "trapezoid").sum() - whole) > 0.02 * whole


@pytest.mark.parametrize("rule", ["mean", "trapezoid"])
def test_one_point_is_exact_for_a_linear_function(rule):
    found = integrated_gradients(lambda x: (x * W).sum(), X, X_Q, 1, rule)
    np.testing.assert_allclose(found, (X - X_Q) * W, rtol=1e-6)


def by_hand(form, points, rule):
    """NumPy in float64, with the derivative of tanh written out."""
    w, q, x, x_q = (np.asarray(a, np.float64) for a in (W, W + 0.1 * W_Q, X, X_Q))
    start = 0 * x if form == "weights" else x_q
    shares = np.ones(points)
    if rule == "trapezoid":
        shares[[0, -1]] = 0.5
    total = 0
    for a, share in zip(np.linspace(0, 1, points), shares / shares.sum(), strict=True):
        z = start + a * (x - start)
        y, y_q = np.tanh(z @ w), np.tanh(z @ q)
        if form == "paper":
            gradient = (1 - y**2) @ w.T
        else:
            sign = np.sign(y - y_q) / 6
            gradient = (sign * (1 - y**2)) @ w.T - (sign * (1 - y_q**2)) @ q.T
        total = total + share * gradient
    return (x - start) * total


@pytest.mark.parametrize(
    ("form", "points", "rule"),
    [("weights", 32, "mean"), ("activations", 8, "trapezoid"), ("paper", 5, "mean")],
)
def test_the_forms_of_paper_and_code(form, points, rule):
    found = quantization_gradients(block, block_q, X, X_Q, form=form, points=points, rule=rule)
    expected = by_hand(form, points, rule)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
    other = by_hand({"weights": "paper"}.get(form, "weights"), points, rule)
    assert np.abs(found - other).max() > 0.05


def test_weights_of_tokens_are_a_distribution():
    attributions = jax.random.normal(jax.random.key(0), (3, 20, 4))
    for clip in (True, False):
        found = token_importance(attributions, clip=clip)
        assert (found >= 0).all()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(token_importance(jnp.full((2, 5, 3), -7.0)), 0.2, rtol=1e-6)
    np.testing.assert_allclose(token_importance(jnp.zeros((2, 5, 3))), 0.2, rtol=1e-6)


def test_a_token_far_out_is_capped():
    attributions = np.array(jax.random.normal(jax.random.key(1), (1, 30, 4)))
    attributions[0, 7] *= 1000
    s = np.abs(attributions.astype(np.float64)).mean(-1)[0]
    q1, q3 = np.quantile(s, [0.25, 0.75])
    clipped = np.clip(s, q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1))
    assert clipped[7] == q3 + 1.5 * (q3 - q1)
    found = token_importance(jnp.asarray(attributions))
    np.testing.assert_allclose(found[0], clipped / clipped.sum(), rtol=1e-5)
    # Negative control: unclipped, the token has nearly all.
    assert token_importance(jnp.asarray(attributions), clip=False)[0, 7] > 0.9


def test_padding_gets_nothing_and_changes_nothing():
    attributions = jax.random.normal(jax.random.key(2), (2, 12, 4)).at[:, 8:].mul(100)
    valid = jnp.arange(12)[None] < jnp.array([[8], [0]])
    found = token_importance(attributions, valid)
    alone = token_importance(attributions[:1, :8])
    np.testing.assert_allclose(found[0, :8], alone[0], rtol=1e-6)
    assert not found[0, 8:].any()
    assert not found[1].any()


def test_what_is_missing_is_refused():
    for options, message in (
        ({"form": "code"}, "form must be"),
        ({"form": "paper"}, "needs the inputs"),
        ({"points": 0}, "at least 1"),
        ({"rule": "simpson"}, "rule must be"),
    ):
        with pytest.raises(ValueError, match=message):
            quantization_gradients(block, block_q, X, **options)
