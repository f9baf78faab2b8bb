"""GPTQ against a float64 version of itself, its limits, and rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives import quantization
from objectives.quantization import calibration_hessian, gptq, round_to_nearest
from objectives.quantization.gptq import rsq_importance

INPUTS, OUTPUTS, TOKENS = 24, 10, 200


@pytest.fixture(scope="module")
def layer():
    """Weights and correlated calibration inputs."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((INPUTS, OUTPUTS))
    mixing = rng.standard_normal((INPUTS, INPUTS))
    inputs = rng.standard_normal((TOKENS, INPUTS)) @ mixing
    return jnp.asarray(weights, jnp.float32), jnp.asarray(inputs, jnp.float32)


def weighted_error(weights, quantized, hessian):
    difference = np.asarray(weights, np.float64) - np.asarray(quantized, np.float64)
    return 0.5 * np.einsum("io,ij,jo->", difference, np.asarray(hessian, np.float64), difference)


def damped(hessian, damping=0.01):
    h = np.asarray(hessian, np.float64)
    return h + damping * np.diag(h).mean() * np.eye(h.shape[0])


def reference(weights, hessian, scale, bits=4):
    """The paper's loop on symmetric integers with a scale per output channel, in float64."""
    w = np.asarray(weights, np.float64).copy()
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian))).T
    q, unrounded = np.zeros_like(w), np.zeros_like(w)
    for i in range(w.shape[0]):
        unrounded[i] = w[i]
        q[i] = scale * np.clip(np.round(w[i] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        w[i:] -= np.outer(upper[i, i:], (w[i] - q[i]) / upper[i, i])
    return q, unrounded


def test_equals_float64(layer):
    weights, inputs = layer
    hessian = calibration_hessian(inputs)
    np.testing.assert_allclose(hessian, 2 * inputs.T @ inputs, rtol=1e-4, atol=1e-2)
    scale = np.abs(np.asarray(weights, np.float64)).max(0) / 7
    expected, unrounded = reference(weights, hessian, scale)
    result = gptq(weights, hessian, quantization.absmax(bits=4))
    np.testing.assert_allclose(result.weights, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.unrounded, unrounded, rtol=1e-4, atol=1e-5)
    # The greedy steps add up to the error in the output.
    error = weighted_error(weights, result.weights, damped(hessian))
    np.testing.assert_allclose(result.loss, error, rtol=1e-3)
    # They are worth it where inputs are correlated.
    nearest = round_to_nearest(weights, quantization.absmax(bits=4))
    assert error < 0.8 * weighted_error(weights, nearest, damped(hessian))
    assert result.codes.dtype == jnp.uint8


@pytest.mark.parametrize("block_size", tiny.mostly_slow([1, 7], (7,)))
def test_block_size_does_not_matter(layer, block_size):
    weights, inputs = layer
    hessian, quantizer = calibration_hessian(inputs), quantization.lsq(bits=4)
    whole = gptq(weights, hessian, quantizer)
    blocks = gptq(weights, hessian, quantizer, block_size=block_size)
    np.testing.assert_array_equal(blocks.codes, whole.codes)
    np.testing.assert_allclose(blocks.loss, whole.loss, rtol=1e-4)


@pytest.mark.parametrize(
    "quantizer",
    [
        pytest.param(quantization.absmax(bits=4), marks=pytest.mark.slow),
        pytest.param(quantization.minmax(bits=3, granularity="tensor"), marks=pytest.mark.slow),
        quantization.seq(granularity="group", group_size=8),
    ],
    ids=lambda q: q.name,
)
def test_diagonal_hessian_is_rounding(layer, quantizer):
    weights, inputs = layer
    nearest = round_to_nearest(weights, quantizer)
    run = jax.jit(lambda hessian: gptq(weights, hessian, quantizer))
    for diagonal in (jnp.ones(INPUTS), jnp.linspace(0.1, 3.0, INPUTS)):
        result = run(jnp.diag(diagonal))
        np.testing.assert_allclose(result.weights, nearest, rtol=1e-6)
    # Negative control: another Hessian is another result.
    other = run(calibration_hessian(inputs))
    assert np.abs(other.weights - nearest).max() > 1e-2


def test_groups_take_their_scale_in_turn(layer):
    weights, inputs = layer
    hessian = calibration_hessian(inputs)
    quantizer = quantization.absmax(bits=4, granularity="group", group_size=8)
    moving = gptq(weights, hessian, quantizer)
    static = gptq(weights, hessian, quantizer, static_groups=True)
    scale = np.abs(np.asarray(weights)).reshape(3, 8, OUTPUTS).max(1) / 7
    assert moving.grid.scale.shape == (3, OUTPUTS)
    np.testing.assert_allclose(static.grid.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(moving.grid.scale[0], scale[0], rtol=1e-6)
    assert np.abs(moving.grid.scale[1:] - scale[1:]).max() > 1e-3
    nearest = weighted_error(weights, round_to_nearest(weights, quantizer), hessian)
    for result in (moving, static):
        assert weighted_error(weights, result.weights, hessian) < nearest


def test_act_order(layer):
    """Quantizing in a given order is quantizing the permuted problem in its own."""
    weights, inputs = layer
    hessian = calibration_hessian(inputs)
    quantizer = quantization.absmax(bits=3)
    order = np.argsort(-np.diag(hessian))
    permuted = gptq(weights[order], hessian[order][:, order], quantizer)
    ordered = gptq(weights, hessian, quantizer, act_order=True)
    np.testing.assert_array_equal(ordered.codes[order], permuted.codes)
    plain = gptq(weights, hessian, quantizer)
    assert (plain.codes != ordered.codes).any()
    groups = quantization.absmax(bits=3, granularity="group", group_size=8)
    result = gptq(weights, hessian, groups, act_order=True, static_groups=True)
    assert weighted_error(weights, result.weights, hessian) < weighted_error(
        weights, round_to_nearest(weights, groups), hessian
    )


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("lsq", 3, {}),
        ("seq", 2, {"act_order": True}),
        ("learned_range", 3, {"act_order": True, "static_groups": True}),
        ("absmax", 4, {}),
    ],
    ids=lambda x: str(x)[:30],
)
def test_the_codes_are_those_of_the_weights_before_they_were_rounded(layer, name, bits, options):
    weights, inputs = layer
    groups = {"granularity": "group", "group_size": 8} if "static_groups" in options else {}
    quantizer = quantization.QUANTIZERS[name](bits=bits, **groups)
    result = gptq(weights, calibration_hessian(inputs), quantizer, **options)
    np.testing.assert_array_equal(quantizer.encode(result.unrounded, result.grid), result.codes)
    # Not those of the weights as they were, nor of the values on the grid.
    assert np.any(quantizer.encode(weights, result.grid) != result.codes)
    assert np.abs(result.unrounded - result.weights).mean() > 0.02 * np.abs(weights).mean()


def test_inputs_that_never_occur(layer):
    weights, inputs = layer
    hessian = calibration_hessian(inputs.at[:, 5].set(0))
    result = gptq(weights, hessian, quantization.absmax(bits=4))
    np.testing.assert_array_equal(result.weights[5], 0)
    assert np.isfinite(result.weights).all()


def test_importance(layer):
    weights, inputs = layer
    ones = jnp.ones(TOKENS)
    plain = calibration_hessian(inputs)
    for form in ("linear", "squared"):
        np.testing.assert_allclose(calibration_hessian(inputs, ones, form), plain, rtol=1e-6)
    r = jnp.linspace(0.1, 1.0, TOKENS)
    linear, squared = (calibration_hessian(inputs, r, form) for form in ("linear", "squared"))
    x, a = np.asarray(inputs, np.float64), np.asarray(r, np.float64)
    np.testing.assert_allclose(linear, 2 * (x.T * (a / a.mean())) @ x, rtol=1e-4, atol=1e-1)
    np.testing.assert_allclose(squared, 2 * (x.T * a**2) @ x, rtol=1e-4, atol=1e-1)

    # A token that counts more is reconstructed better.
    quantizer = quantization.absmax(bits=2)
    errors = []
    for weight in (1.0, 300.0):
        hessian = calibration_hessian(inputs, ones.at[3].set(weight))
        result = gptq(weights, hessian, quantizer)
        errors.append(float(jnp.square(inputs[3] @ (weights - result.weights)).sum()))
    assert errors[1] < 0.5 * errors[0]


def test_rsq_importance_of_uniform_causal_attention():
    scores = (np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]).sum(0)
    np.testing.assert_allclose(scores, [25 / 12, 13 / 12, 7 / 12, 1 / 4])
    r = rsq_importance(jnp.asarray(scores), 0.01)
    np.testing.assert_allclose(r, [1, 0.46, 0.19, 0.01], rtol=1e-5)
    np.testing.assert_allclose(rsq_importance(jnp.ones(4), 0.01), 0.01)


def test_compiles_and_refuses(layer):
    weights, inputs = layer
    hessian = calibration_hessian(inputs)
    quantizer = quantization.absmax(bits=4)
    compiled = jax.jit(lambda w, h: gptq(w, h, quantizer).codes)(weights, hessian)
    assert (compiled == gptq(weights, hessian, quantizer).codes).mean() > 0.99
    groups = quantization.absmax(bits=4, granularity="group", group_size=8)
    sevens = quantization.absmax(bits=4, granularity="group", group_size=7)
    for call, reason in (
        (lambda: gptq(weights, hessian[1:], quantizer), "hessian"),
        (lambda: gptq(weights, hessian, quantization.lsq(contraction_axis=-1)), "contraction_axis"),
        (lambda: gptq(weights, hessian, groups, act_order=True), "static_groups"),
        (lambda: calibration_hessian(inputs, form="cubed"), "form must be"),
        (lambda: gptq(weights, hessian, sevens), "group_size=7 does not divide"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
