"""Straight-through gradients in forward mode: the transpose of what reverse mode gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.phases import make_quantized
from lm.model.trained import Trained
from lm.training.forward import make_prediction_statistics
from lm.training.state import parameter_shapes
from objectives.quantization import QUANTIZERS

WIDTHS = {"elastic_binary": 1, "ternary": 1.58, "seq": 2, "fp8_e4m3": 8, "fp8_e5m2": 8}


@pytest.mark.parametrize(
    "granularity", tiny.mostly_slow(["tensor", "channel", "group"], ("group",))
)
@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        sorted(QUANTIZERS), ("absmax", "elastic_binary", "learned_range", "lsq", "nvfp4")
    ),
)
def test_forward_is_the_transpose_of_reverse(name, granularity):
    if granularity == "tensor" and name in ("mxfp4", "nvfp4"):
        granularity = "group"  # they have no other
    size = {"mxfp4": 32, "nvfp4": 16}.get(name, 8)
    layout = {"group_size": size} if granularity == "group" else {}
    quantizer = QUANTIZERS[name](bits=WIDTHS.get(name, 4), granularity=granularity, **layout)
    keys = jax.random.split(jax.random.key(0), 4)
    w, d_w, cotangent = (jax.random.normal(key, (2, 32, 6)) for key in keys[:3])
    scale = jax.tree.map(lambda s: 0.7 * s, quantizer.init(w))
    d_scale = jax.tree.map(lambda s: jax.random.normal(keys[3], s.shape), scale)

    def both(w, scale):
        forward = jax.jvp(quantizer.quantize, (w, scale), (d_w, d_scale))[1]
        reverse = jax.vjp(quantizer.quantize, w, scale)[1](cotangent)
        return forward, reverse

    forward, reverse = jax.jit(both)(w, scale)
    pairs = zip(*map(jax.tree.leaves, (reverse, (d_w, d_scale))), strict=True)
    expected = sum(jnp.vdot(a, b) for a, b in pairs)
    np.testing.assert_allclose(jnp.vdot(forward, cotangent), expected, rtol=1e-4, atol=1e-4)
    assert np.any(forward)


@pytest.mark.parametrize("activations", tiny.mostly_slow(["none", "int8"], ("int8",)))
def test_a_quantized_model_has_a_forward_mode(activations):
    """Lowered, not compiled: JAX refuses forward mode while lowering."""
    c, batch = tiny.config(quantization__bits=4.0).quantization, tiny.batch(2, 16)
    c.activations = activations

    def lower(plain):
        model = tiny.model(plain_autodiff=plain, layers=1)
        shapes = parameter_shapes(model)
        quantized = make_quantized(c, shapes)
        statistics = make_prediction_statistics(model, 0, quantized)
        trained = Trained(shapes, jax.eval_shape(quantized.first_scales, shapes))

        def loss(trained):
            return statistics(trained, batch).nll.sum()

        def products(trained):
            along = (trained,), (trained,)
            return jax.jvp(loss, *along), jax.jvp(jax.grad(loss), *along)

        return jax.jit(products).lower(trained)

    lower(True)
    with pytest.raises(TypeError, match="forward-mode"):
        lower(False)
