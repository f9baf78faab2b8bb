"""What is written differently for XLA on CPU has the same values, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import products, rotary


@pytest.fixture(params=["cpu", "tpu"])
def kind(request, monkeypatch):
    for module in (products, rotary):
        monkeypatch.setattr(module, "platform", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("d", "f"), [(6, 10), (10, 6), (8, 8)])
def test_gradients_of_a_product(kind, d, f):
    rng = np.random.default_rng(0)
    x_BTD, w_DF, slope_BTF = (rng.normal(size=s) for s in ((2, 5, d), (d, f), (2, 5, f)))

    def total(x_BTD, w_DF):
        return (products.project(x_BTD, w_DF) * slope_BTF).sum()

    value, (dx_BTD, dw_DF) = jax.jit(jax.value_and_grad(total, (0, 1)))(
        *(jnp.float32(x) for x in (x_BTD, w_DF))
    )
    np.testing.assert_allclose(value, (x_BTD @ w_DF * slope_BTF).sum(), rtol=1e-5)
    np.testing.assert_allclose(dx_BTD, slope_BTF @ w_DF.T, rtol=1e-4, atol=1e-5)
    expected_DF = np.einsum("btd,btf->df", x_BTD, slope_BTF)
    np.testing.assert_allclose(dw_DF, expected_DF, rtol=1e-4, atol=1e-5)


def test_sine_and_cosine_of_any_position(kind):
    positions_BT = np.array([[0, 1, 255], [-3, 7, 2]])
    sin_BTH, cos_BTH = jax.jit(lambda p: rotary.turns(p, 8, 100.0))(positions_BT)
    angle_BTH = positions_BT[..., None] * 100.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(sin_BTH, np.sin(angle_BTH), atol=2e-5)
    np.testing.assert_allclose(cos_BTH, np.cos(angle_BTH), atol=2e-5)
