"""QAT over a tree: every matrix is covered, layers are separate, meshes change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from objectives import quantization
from objectives.quantization import default_quantizers, init_scales, quantize_tree

LAYERS, WIDTH, MLP, VOCABULARY = 2, 16, 32, 24


def default_rules(*arguments, **layout):
    """The default quantizers for the paths of `make_params`."""
    by_kind = default_quantizers(*arguments, **layout)

    def rules(path):
        section, _, rest = path.partition("/")
        if path.endswith("scale"):
            return by_kind["vector"]
        if section in ("embedding", "head"):
            return by_kind[section]
        if rest.split("/")[-1] == "router":
            raise ValueError(f"parameter {path} is unknown")
        return by_kind["matrix"]

    return rules


def make_params():
    """The paths and shapes of the model's parameters."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32)

    square = (LAYERS, WIDTH, WIDTH)
    return {
        "embedding": {"table": normal(VOCABULARY, WIDTH)},
        "layers": {
            "attention": {n: normal(*square) for n in ("query", "key", "value", "output")},
            "attention_norm": {"scale": jnp.ones((LAYERS, WIDTH))},
            "mlp": {
                "up": normal(LAYERS, WIDTH, MLP),
                "gate": normal(LAYERS, WIDTH, MLP),
                "down": normal(LAYERS, MLP, WIDTH),
            },
            "mlp_norm": {"scale": jnp.ones((LAYERS, WIDTH))},
        },
        "final_norm": {"scale": jnp.ones(WIDTH)},
        "head": {"kernel": normal(WIDTH, VOCABULARY)},
    }


def test_default_rules():
    params, rules = make_params(), default_rules(2)
    scales = init_scales(params, rules)
    quantized = quantize_tree(params, scales, rules)
    assert scales["embedding"]["table"].shape == (VOCABULARY, 1)  # one a token
    assert scales["head"]["kernel"].shape == (1, VOCABULARY)
    assert scales["layers"]["mlp"]["down"].shape == (LAYERS, 1, WIDTH)
    assert scales["final_norm"]["scale"] == ()
    for path in (("final_norm",), ("layers", "attention_norm"), ("layers", "mlp_norm")):
        before, after = params, quantized
        for key in path:
            before, after = before[key], after[key]
        assert after["scale"] is before["scale"]
    # Embedding and head on 4 bits, the layers on 2.
    assert 4 < len(np.unique(quantized["head"]["kernel"][:, 0])) <= 16
    assert 4 < len(np.unique(quantized["embedding"]["table"][0])) <= 16
    assert len(np.unique(quantized["layers"]["attention"]["query"][1, :, 3])) == 4


@pytest.mark.parametrize("bits", [16, 32])
def test_wide_is_the_identity(bits):
    params, rules = make_params(), default_rules(bits, quantization.absmax)
    quantized = quantize_tree(params, init_scales(params, rules), rules)
    for got, want in zip(jax.tree.leaves(quantized), jax.tree.leaves(params), strict=True):
        assert got is want


def test_widths_of_a_config_are_floats():
    """4.0 is 4, down to the codes, whose arithmetic is that of integers."""
    quantizer = default_quantizers(4.0, quantization.dense_shift)["matrix"]
    weights = make_params()["layers"]["mlp"]["up"]
    grid = quantizer.grid(weights, ())
    decoded = quantizer.decode(quantizer.encode(weights, grid), grid)
    np.testing.assert_array_equal(decoded, quantizer.quantize(weights, ()))
    assert default_quantizers(1.58)["matrix"].name == "ternary"


def test_scan_over_layers_is_the_stacked_call():
    """Values and gradients, with the slices of one layer at a time and their prefix."""
    params, rules = make_params(), default_rules(2, granularity="group", group_size=8)
    scales = init_scales(params, rules)["layers"]
    layers = params["layers"]
    coefficients = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), layers)

    def dot(quantized, coefficients):
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), quantized, coefficients)
        return sum(jax.tree.leaves(products))

    def stacked(layers, scales):
        return dot(quantize_tree(layers, scales, rules, "layers/"), coefficients)

    def scanned(layers, scales):
        def layer(total, slices):
            params, scales, coefficients = slices
            return total + dot(quantize_tree(params, scales, rules, "layers/"), coefficients), None

        return jax.lax.scan(layer, 0.0, (layers, scales, coefficients))[0]

    both = [jax.jit(jax.value_and_grad(f, (0, 1)))(layers, scales) for f in (stacked, scanned)]
    assert jax.tree.leaves(both[0][1][1])
    for got, want in zip(*(jax.tree.leaves(b) for b in both), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_any_mesh():
    params, rules = make_params(), default_rules(2)
    scales = init_scales(params, rules)

    def loss(params, scales):
        leaves = jax.tree.leaves(quantize_tree(params, scales, rules))
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in leaves)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(a):
        spec = P(*(None,) * (a.ndim - 2), "fsdp", "tensor") if a.ndim > 1 else P()
        if a.ndim == 2 and a.shape[0] % 4:
            spec = P(None, "tensor")
        return jax.device_put(a, NamedSharding(mesh, spec))

    expected, actual = run(params, scales), run(jax.tree.map(place, params), scales)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_forgotten_leaf_is_an_error():
    params, rules = make_params(), default_rules(4)
    params["layers"]["mlp"]["router"] = jnp.ones((LAYERS, WIDTH, 4))
    with pytest.raises(ValueError, match="parameter layers/mlp/router is unknown"):
        init_scales(params, rules)
    scales = init_scales(params, lambda path: None if path.endswith("router") else rules(path))
    assert scales["layers"]["mlp"]["router"] == ()


def test_rules_speak_of_single_leaves():
    params = {"layers": {"mlp": {"up": jnp.ones((1, 4, 4)), "down": jnp.ones((1, 4, 4))}}}
    rules = default_rules(4)
    scales = init_scales(params, lambda path: None if path.endswith("mlp/up") else rules(path))
    assert scales["layers"]["mlp"]["up"] == ()
    assert scales["layers"]["mlp"]["down"].shape == (1, 1, 4)


def test_a_shape_that_does_not_fit_is_named():
    rules = default_rules(4, granularity="group", group_size=12)
    with pytest.raises(ValueError, match="embedding/table: group_size=12 does not divide the 16"):
        init_scales(make_params(), rules)


def test_error_and_share_outside():
    params, rules = make_params(), default_rules(4)
    scales = init_scales(params, rules)
    error = quantization.quantization_error(params, scales, rules)
    outside = quantization.outside_clip_range(params, scales, rules)
    assert set(error) == set(outside)
    assert len(error) == 9
    name, w = "layers/mlp/up", np.asarray(params["layers"]["mlp"]["up"], np.float64)
    assert error[name].shape == outside[name].shape == (LAYERS,)
    q = np.asarray(quantize_tree(params, scales, rules)["layers"]["mlp"]["up"], np.float64)
    expected = np.square(w - q).sum((1, 2)) / np.square(w).sum((1, 2))
    np.testing.assert_allclose(error[name], expected, rtol=1e-5)
    np.testing.assert_array_equal(outside[name], 0)

    # Half the scale: what is beyond -8 and 7 half steps.
    scales["layers"]["mlp"]["up"] *= 0.5
    x = w / np.asarray(scales["layers"]["mlp"]["up"], np.float64)
    outside = quantization.outside_clip_range(params, scales, rules)[name]
    np.testing.assert_allclose(outside, ((x < -8) | (x > 7)).mean((1, 2)), atol=1e-6)
    assert outside.min() > 0
