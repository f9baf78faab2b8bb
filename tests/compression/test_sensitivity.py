"""Sensitivities of a trained toy model, against what rounding does to its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr
from test_after_training import CALIBRATION, trained

from lm.compression.plan_widths import make_sensitivity
from lm.compression.sensitivity import Subject, measured, qig, token_weights
from lm.compression.snip import snip
from lm.compression.widths import of_width
from lm.model.parameters import LAYERS, layer_matrices
from objectives.quantization import absmax
from objectives.quantization.snip import adamw_jacobian

CHOICES = (2, 3, 4, 8)


@functools.cache
def subject(choices=CHOICES):
    model, params, _ = trained()
    paths = tuple(f"{LAYERS}/{name}" for name in layer_matrices(params[LAYERS]))
    return Subject(model, params, CALIBRATION, of_width(absmax), choices, paths)


@functools.cache
def mean_loss():
    """The loss of all batches at once, as it is in the tests of GPTQ."""
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *CALIBRATION)
    loss = trained()[2]
    return jax.jit(lambda params: loss(params, batch))


def changed(params, path, layer, value):
    """The parameters with another matrix in one layer."""
    _, part, name = path.split("/")
    layers = {k: dict(v) if isinstance(v, dict) else v for k, v in params[LAYERS].items()}
    layers[part][name] = layers[part][name].at[layer].set(value)
    return {**params, LAYERS: layers}


def matrix(params, path):
    _, part, name = path.split("/")
    return params[LAYERS][part][name]


def rounded(w, bits):
    """Symmetric integers in NumPy, a scale for each output channel."""
    w = np.asarray(w, np.float64)
    scale = np.abs(w).max(0) / (2 ** (bits - 1) - 1)
    return scale * np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@functools.cache
def increases():
    return measured()(subject())


@pytest.mark.slow
def test_measured_is_the_increase_of_the_loss():
    s, found = subject(), increases()
    assert found.shape == (12, 4)
    for item, choice in ((0, 0), (7, 1), (11, 2)):
        path, layer = s.items()[item]
        w = rounded(matrix(s.params, path)[layer], s.choices[choice])
        loss = mean_loss()
        expected = loss(changed(s.params, path, layer, w)) - loss(s.params)
        np.testing.assert_allclose(found[item, choice], expected, rtol=0.02, atol=1e-5)
    # Fewer bits hurt more, as far as they hurt at all.
    assert (found[:, 0] > found[:, 1]).all()
    assert (found[:, 1] > found[:, 2]).all()


@pytest.mark.slow
def test_the_loss_divergence_is_that_of_the_norms():
    s = subject()
    found = snip(0)(s)
    loss, gradient = jax.value_and_grad(mean_loss())(s.params)
    for item, (path, layer) in enumerate(s.items()):
        g = np.asarray(matrix(gradient, path)[layer], np.float64)
        w = np.asarray(matrix(s.params, path)[layer], np.float64)
        for choice, bits in enumerate(s.choices):
            error = np.linalg.norm(w - rounded(w, bits))
            expected = np.linalg.norm(g) * error / np.sqrt(w.size) / float(loss)
            np.testing.assert_allclose(found[item, choice], expected, rtol=1e-3)
    # It orders layers and widths as the measured change of the loss does, well above chance.
    assert spearmanr(found.ravel(), np.abs(increases()).ravel()).statistic > 0.5
    assert spearmanr(found[:, 0], np.abs(increases())[:, 0]).statistic > 0


@pytest.mark.slow
def test_the_weight_divergence_is_that_of_a_noisy_gradient():
    """One item by its definition; the moments are those of the caller."""
    s = subject()
    gradient = jax.grad(mean_loss())
    plain = gradient(s.params)
    moments = [
        {path: scale * jnp.ones_like(matrix(plain, path)) for path in s.paths}
        for scale in (1e-3, 1e-4)
    ]
    options = {"learning_rate": 0.5, "beta1": 0.8, "beta2": 0.9}
    of_loss = snip(0)(s)
    found = (snip(2.0, noise=0.02, moments=moments, step=7, **options)(s) - of_loss) / 2
    path, layer = s.items()[3]
    w = np.asarray(matrix(s.params, path)[layer], np.float64)
    key = jax.random.fold_in(jax.random.key(0), 3)
    noise = 0.02 * np.sqrt((w**2).mean()) * np.asarray(jax.random.normal(key, w.shape))
    noisy = gradient(changed(s.params, path, layer, w + noise))
    total = 0.0
    for m in s.paths:
        g, other = (np.asarray(matrix(tree, m), np.float64) for tree in (plain, noisy))
        slope = np.asarray(
            adamw_jacobian(matrix(plain, m), moments[0][m], moments[1][m], 7, **options)
        )
        change, size = slope * (other - g), np.asarray(matrix(s.params, m), np.float64)
        for i in range(2):
            total += np.linalg.norm(change[i]) / np.linalg.norm(size[i])
    for choice, bits in enumerate(s.choices):
        expected = total * np.linalg.norm(w - rounded(w, bits)) / np.linalg.norm(noise)
        np.testing.assert_allclose(found[3, choice], expected, rtol=0.02)
    # With the moments of the batches it is another number, and still finite.
    c = tiny.config(optimizer__peak_learning_rate=0.1, optimizer__beta1=0.8).optimizer
    settled = make_sensitivity("snip", c)(s)
    same = snip(learning_rate=0.1, beta1=0.8, beta2=c.beta2)(s)
    np.testing.assert_array_equal(settled, same)
    assert np.abs(settled - snip()(s)).max() > 1e-4
    assert np.isfinite(settled).all()
    assert (settled > of_loss).all()
    assert spearmanr(settled.ravel(), np.abs(increases()).ravel()).statistic > 0


@functools.cache
def gradients_of_inputs():
    return qig(points=4)(subject((2, 4)))


@pytest.mark.slow
def test_the_sensitivity_by_integrated_gradients_goes_with_the_loss():
    found = gradients_of_inputs()
    assert found.shape == (12, 2)
    assert (found[:, 0] > found[:, 1]).all()
    assert spearmanr(found.ravel(), increases()[:, [0, 2]].ravel()).statistic > 0


def test_tokens_have_weights():
    """Of the first layer with one rounded matrix; padding has none."""
    model = tiny.model()
    params = tiny.params(model)
    layer = jax.tree.map(lambda x: x[0], params[LAYERS])
    up = layer["mlp"]["up"]
    b = tiny.batch(rows=2)
    segments = b["segment_ids"].at[1, 10:].set(0)
    x = model.embed(params, b["tokens"], b["positions"])

    @jax.jit
    def weights(up):
        rounded = {**layer, "mlp": {**layer["mlp"], "up": up}}
        return token_weights(model, layer, rounded, x, b["positions"], segments, points=4)

    found = weights(jnp.asarray(rounded(up, 2), jnp.float32))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert not found[1, 10:].any()
    assert found[0].std() > 1e-3
    # Negative control: where nothing is rounded all tokens are alike.
    np.testing.assert_allclose(weights(up)[0], 1 / 16, rtol=1e-5)
