"""Outlier Suppression+ of a whole model: the same function, with inputs easier to quantize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.outlier_suppression import (
    apply_outlier_suppression,
    outlier_suppression_model,
    search_outlier_suppression,
)
from lm.compression.phases import default_rules
from lm.errors import InputError
from lm.model.interface import LayerProducts
from lm.model.streams import with_leaves
from objectives.quantization import absmax, activation_quantizer, round_to_nearest

RULES = default_rules(6, absmax)
ACTIVATION = activation_quantizer(6)
SMALL = {"width": 16, "heads": 2, "mlp_width": 24}
VARIANTS = {
    "layernorm": {**SMALL, "kv_heads": 2, "norm": "layernorm", "norm_offset": 1.0},
    "rmsnorm, gated": {**SMALL, "kv_heads": 1, "activation": "swiglu", "norm_placement": "both"},
    "biases": {
        **SMALL,
        "kv_heads": 2,
        "norm": "layernorm",
        "attention_bias": "all",
        "mlp_bias": True,
    },
}
CHANGES = {
    "layernorm": {"attention_bias": "qkv", "mlp_bias": True},
    "rmsnorm, gated": {"attention_bias": "qkv", "mlp_bias": True, "norm_bias": True},
    "biases": {},
}
BATCHES = [tiny.batch(2, 12, seed) for seed in range(2)]


@functools.cache
def outliers(name):
    """A model, and parameters with channels behind its norms that lie far out, or reach far."""
    model = tiny.model(**VARIANTS[name])
    leaves, structure = jax.tree.flatten_with_path(tiny.params(model))
    rng = np.random.default_rng(0)
    moved = []
    for path, leaf in leaves:
        key = path[-1].key
        if key == "scale":
            leaf = leaf * rng.uniform(0.5, 1.5, leaf.shape) + 8 * (rng.random(leaf.shape) < 0.1)
        elif "bias" in key:
            leaf = leaf + rng.normal(size=leaf.shape) * np.where(rng.random(leaf.shape) < 0.1, 9, 1)
        moved.append(jnp.asarray(leaf, jnp.float32))
    return model, jax.tree.unflatten(structure, moved)


@functools.cache
def found(name):
    model, params = outliers(name)
    return search_outlier_suppression(model, params, BATCHES, RULES, ACTIVATION, most_steps=20)


@functools.cache
def _run(model, product=None):
    products = {} if product is None else {"products": LayerProducts(product)}

    def run(params, batch):
        return model.apply(params, tiny.inputs(batch), **products).hidden @ model.head(params)

    return jax.jit(run)


def logits(model, params, *product, batch=BATCHES[0]):
    return _run(model, *product)(params, batch)


@pytest.mark.parametrize("name", tiny.mostly_slow(VARIANTS, ["rmsnorm, gated"]))
def test_function_stays(name):
    model, params = outliers(name)
    result = found(name)
    changes, new = apply_outlier_suppression(model, params, result)
    assert changes == CHANGES[name]
    after = tiny.model(**VARIANTS[name] | changes)
    assert jax.tree.structure(new) == jax.tree.structure(tiny.params(after))
    assert set(result) == {"attention_norm", "mlp_norm"}
    for one in result.values():
        assert one.scale.max() > 1.5
        assert (one.loss <= one.first_loss).all()
    assert any((one.loss < 0.9 * one.first_loss).any() for one in result.values())
    before = logits(model, params)
    np.testing.assert_allclose(logits(after, new), before, atol=2e-4, rtol=1e-4)
    # The shift is in the biases: without them there are other logits.
    for path in ("layers/attention/value_bias", "layers/mlp_norm/bias"):
        leaf = functools.reduce(lambda part, key: part[key], path.split("/"), new)
        wrong = logits(after, with_leaves(new, {path: 0 * leaf}))
        assert np.abs(wrong - before).max() > 1e-2, path


def test_inputs_are_within_the_threshold():
    """Of the calibration data, and the middle of every channel is zero."""
    name = "rmsnorm, gated"
    model, params = outliers(name)
    changes, new = apply_outlier_suppression(model, params, found(name))
    after = tiny.model(**VARIANTS[name] | changes)
    seen = []

    @jax.jit
    def run(params, batch):
        inputs = {}

        def product(path, x, w, scale):
            inputs[path.removeprefix("layers/")] = x
            return x @ w

        layer = jax.tree.map(lambda a: a[0], params["layers"])
        x = after.embed(params, batch["tokens"], batch["positions"])
        after.block(layer, x, batch["positions"], batch["segment_ids"], product)
        return inputs

    seen = [run(new, batch) for batch in BATCHES]
    for norm, matrix in (("attention_norm", "attention/query"), ("mlp_norm", "mlp/gate")):
        x = np.concatenate([inputs[matrix].reshape(-1, 16) for inputs in seen])
        assert np.abs(x).max() <= found(name)[norm].threshold[0] * (1 + 1e-4)
        np.testing.assert_allclose(x.max(0), -x.min(0), rtol=1e-3, atol=1e-3)


def test_quantized_activations_hurt_less():
    name = "rmsnorm, gated"
    model, params = outliers(name)
    changes, new = apply_outlier_suppression(model, params, found(name))
    after = tiny.model(**VARIANTS[name] | changes)

    def product(path, x, w, scale):
        if path.endswith(("output", "down")):
            return x @ w
        return ACTIVATION(x) @ round_to_nearest(w, RULES(path))

    held_out = tiny.batch(2, 12, seed=9)
    full = logits(model, params, batch=held_out)
    plain = np.square(logits(model, params, product, batch=held_out) - full).mean()
    suppressed = np.square(logits(after, new, product, batch=held_out) - full).mean()
    assert suppressed < 0.5 * plain


@pytest.mark.slow
def test_scales_alone_and_padding():
    model, params = outliers("rmsnorm, gated")
    options = {"shift": False, "most_steps": 5}
    arguments = (RULES, ACTIVATION)
    changes, new = outlier_suppression_model(model, params, BATCHES, *arguments, **options)
    assert changes == {}
    assert (new["layers"]["mlp"]["up"] != params["layers"]["mlp"]["up"]).any()
    np.testing.assert_allclose(logits(model, new), logits(model, params), atol=1e-4, rtol=1e-4)
    batch = BATCHES[0]
    padded = {**batch, "segment_ids": batch["segment_ids"].at[1].set(0)}
    first = jax.tree.map(lambda a: a[:1], batch)
    got, want, other = (
        search_outlier_suppression(model, params, [b], *arguments, **options)["mlp_norm"]
        for b in (padded, first, batch)
    )
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3)
    assert np.abs(other.first_loss / want.first_loss - 1).max() > 1e-3


def test_refuses():
    model, params = outliers("rmsnorm, gated")
    broken = params | {"embedding": {"table": jnp.nan * params["embedding"]["table"]}}
    with pytest.raises(InputError, match="layer 0 has outputs that are not finite"):
        search_outlier_suppression(model, broken, BATCHES, RULES, ACTIVATION, most_steps=20)
    after = tiny.model(norm_placement="after")
    with pytest.raises(InputError, match=r"model.norm_placement=after .* valid: before"):
        search_outlier_suppression(after, {}, BATCHES, RULES, ACTIVATION)
