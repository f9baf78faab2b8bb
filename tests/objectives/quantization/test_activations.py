"""Activations on the grid of their token, against float64; what is not finite stays so."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from objectives.quantization import activation_quantizer

DTYPES = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
KINDS = (4, 5, 6, 7, 8, *DTYPES)


def top(kind):
    return float(ml_dtypes.finfo(DTYPES[kind]).max) if kind in DTYPES else 2.0 ** (kind - 1) - 1


def reference(kind, x):
    """Token by token, in float64; casts of ml_dtypes round half to even."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest / top(kind), 1.0)
    if kind in DTYPES:
        return scale * (x / scale).astype(DTYPES[kind]).astype(np.float64)
    return scale * np.round(x / scale)


@pytest.fixture(scope="module")
def compiled():
    return {kind: jax.jit(activation_quantizer(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind, compiled):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 16)) * np.exp(rng.uniform(-6, 6, (3, 5, 1)))
    x[1, 2] = 0
    x = x.astype(np.float32)
    expected = reference(kind, x)
    got = np.asarray(compiled[kind](x), np.float64)
    size = np.abs(x).max(-1, keepdims=True)
    np.testing.assert_allclose(
        got / np.maximum(size, 1e-30), expected / np.maximum(size, 1e-30), atol=1e-6
    )
    np.testing.assert_array_equal(got[1, 2], 0)
    # One scale a token: a scale for the whole tensor would be another grid.
    tensor = reference(kind, x.reshape(-1)).reshape(x.shape)
    assert (tensor != expected).mean() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_even(kind, compiled):
    """Multiples of half a level with a scale of 2^-3: every tie is exact."""
    if kind in DTYPES:
        x = np.array([top(kind), 17, 19, -17, 1 + 2.0**-4, 1 + 3 * 2.0**-4, 1 + 2.0**-3, 0])
    else:
        x = np.array([top(kind), 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -top(kind)])
    x = (x / 8).astype(np.float32)[None]
    got = compiled[kind](np.resize(x, (1, 1, 8)))[0]
    np.testing.assert_array_equal(got, reference(kind, x))
    if kind not in DTYPES:
        np.testing.assert_array_equal(8 * got[0, 1:7], [0, 2, 2, 0, -2, -2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind, compiled):
    x = np.ones((1, 4, 16), np.float32)
    x[0, 0, 3], x[0, 1, 3], x[0, 2, 3] = np.nan, np.inf, -np.inf
    got = np.asarray(compiled[kind](x))
    assert np.isnan(got[0, :3]).all()
    np.testing.assert_allclose(got[0, 3], 1)


@pytest.mark.parametrize("kind", [4, 8, "fp8_e4m3"])
def test_the_gradient_passes_unchanged(kind):
    quantize = activation_quantizer(kind)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    y, vjp = jax.vjp(quantize, x)
    assert np.abs(y - x).max() > 1e-3
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)


def test_bfloat16_is_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (4, 32)).astype(jnp.bfloat16)
    got = activation_quantizer(8)(x)
    assert got.dtype == jnp.bfloat16
    wide = activation_quantizer(8)(x.astype(jnp.float32))
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


def test_kinds():
    assert activation_quantizer(16) is None
    assert activation_quantizer(32) is None
    for kind in (3, 9, 15, "int8", "fp8"):
        with pytest.raises(ValueError, match="activations have 4, 5, 6, 7, 8, or 16"):
            activation_quantizer(kind)
