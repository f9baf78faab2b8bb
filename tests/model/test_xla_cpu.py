"""Forms for XLA on CPU: the values are those of NumPy, and no other platform gets them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lm.errors import InputError
from lm.model import products, rotary, xla_cpu
from lm.model.interface import Tokens
from lm.model.trained import Trained
from lm.training.forward import make_prediction_statistics

DEVICES = {
    "tpu": AbstractDevice("TPU v5", None, "tpu"),
    "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"),
    "cpu": AbstractDevice("cpu", None, "cpu"),
}


@pytest.fixture(params=[False, True], ids=["cpu", "plain"])
def form(request):
    with xla_cpu.plain_autodiff(request.param):
        assert xla_cpu.is_on() != request.param
        yield


@pytest.mark.parametrize(("d", "f"), [(6, 10), (10, 6)])
def test_gradients_of_a_product(form, d, f):
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


def test_gelu_and_its_slope(form):
    x = np.linspace(-5, 5, 41)
    c = (2 / np.pi) ** 0.5
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = (1 + t) / 2 + x / 2 * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    value, found = jax.jit(jax.vmap(jax.value_and_grad(xla_cpu.gelu)))(jnp.float32(x))
    np.testing.assert_allclose(value, x * (1 + t) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5)


def test_sine_and_cosine_of_any_position(form):
    positions_BT = np.array([[0, 1, 255], [-3, 7, 2]])
    sin_BTH, cos_BTH = jax.jit(lambda p: rotary.rope_angles(p, rotary.Rope(8, 100.0)))(positions_BT)
    angle_BTH = positions_BT[..., None] * 100.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(sin_BTH, np.sin(angle_BTH), atol=2e-5)
    np.testing.assert_allclose(cos_BTH, np.cos(angle_BTH), atol=2e-5)


def lowered(kind: str, **overrides) -> tuple[str, str]:
    """The model's forward pass as a jaxpr, and its gradient as a program, for a kind of device."""
    model, batch = tiny.model(**overrides), tiny.batch(2, 16)
    params = jax.eval_shape(model.init, jax.random.key(0))
    inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"])
    statistics = make_prediction_statistics(model, 1024)

    def loss(params):
        return statistics(Trained(params), batch).nll.sum()

    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=DEVICES[kind])
    with jax.sharding.use_abstract_mesh(mesh):
        forward = str(jax.make_jaxpr(lambda p: model.apply(p, inputs).hidden)(params))
        traced = jax.jit(jax.grad(loss)).trace(params)
        return forward, traced.lower(lowering_platforms=(kind,)).as_text()


# What marks each form: custom gradients, a conditional, a barrier.
MARKS = {
    "forward": ("custom_vjp_call", "cond["),
    "gradient": ("optimization_barrier", "stablehlo.case"),
}


def marks(forward: str, gradient: str) -> set[str]:
    found = {mark for mark in MARKS["forward"] if mark in forward}
    return found | {mark for mark in MARKS["gradient"] if mark in gradient}


@pytest.mark.parametrize("kind", tiny.mostly_slow(["tpu", "cuda"], ("tpu",)))
def test_no_other_platform_gets_them(kind):
    assert marks(*lowered(kind)) == set()
    assert marks(*lowered("cpu")) == {mark for names in MARKS.values() for mark in names}


def test_plain_autodiff_has_none_on_cpu():
    assert marks(*lowered("cpu", plain_autodiff=True)) == set()
    with pytest.raises(InputError, match=r"plain_autodiff=True: model.attention=cudnn"):
        tiny.model(plain_autodiff=True, attention="cudnn")


@functools.cache
def losses(plain: bool):
    """Functions of a toy's parameters: the sum of its losses; and the parameters."""
    model = tiny.model(plain_autodiff=plain, layers=1, activation="gelu")
    statistics, batch = make_prediction_statistics(model, 0), tiny.batch(2, 16)

    def loss(params):
        return statistics(Trained(params), batch).nll.mean()

    params = tiny.params(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, x.shape) * 0.1 for k, x in zip(keys, leaves, strict=True)]
    return loss, params, jax.tree.unflatten(tree, drawn)


@pytest.mark.slow
def test_forward_mode_and_hessian_products_of_a_model():
    loss, params, direction = losses(True)

    def both(params):
        forward = jax.jvp(loss, (params,), (direction,))
        return forward, *jax.jvp(jax.grad(loss), (params,), (direction,))

    both = jax.jit(both)
    (value, slope), gradient, product = both(params)
    parts = jax.tree.map(jnp.vdot, gradient, direction)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(parts)), rtol=1e-4)
    # Against central differences of the gradient, and the gradient of the form for CPU.
    step = 2e-3
    ends = [
        both(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))[1] for s in (-step, step)
    ]
    expected = jax.tree.map(lambda a, b: (b - a) / (2 * step), *ends)
    for got, want in zip(*map(jax.tree.leaves, (product, expected)), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()) + 2e-4)
        assert np.any(got)
    usual = losses(False)[0]
    same, of_usual = jax.jit(jax.value_and_grad(usual))(params)
    np.testing.assert_allclose(value, same, rtol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (gradient, of_usual)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(usual, (params,), (direction,))
