"""A rotated model has the logits of the model, and fewer outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.rotation import rotate_model
from lm.errors import InputError

# Widths 2 * 12 and 36; heads 4 and 12 wide.
GROUPED = {"width": 24, "heads": 6, "kv_heads": 2, "head_width": 4, "mlp_width": 16}
WIDE = {"width": 36, "heads": 3, "kv_heads": 3, "mlp_width": 20}
VARIANTS = {
    "grouped, tied, swiglu": {**GROUPED, "tied_head": True, "activation": "swiglu"},
    "biases, gelu, offset": {
        **WIDE,
        "attention_bias": "all",
        "mlp_bias": True,
        "norm_offset": 1.0,
        "qk_norm": True,
        "embedding_scale": 3.0,
    },
    "low rank, positions, parallel": {
        **GROUPED,
        "embedding": "learned_low_rank",
        "embedding_rank": 8,
        "tied_head": True,
        "positions": "learned",
        "max_positions": 16,
        "parallel_block": True,
    },
    "projected codes": {**GROUPED, "embedding": "projected", "code_head": True},
}


@functools.cache
def _run(model):
    batch = tiny.batch(2, 12)
    return jax.jit(lambda params: tiny.hidden(model, params, batch) @ model.head(params))


def logits(model, params):
    return _run(model)(params)


@functools.cache
def uneven(name):
    """A model with gains and biases that are not those of the start."""
    model = tiny.model(**VARIANTS[name])
    leaves, structure = jax.tree.flatten(tiny.params(model))
    rng = np.random.default_rng(7)
    moved = []
    for leaf in map(np.asarray, leaves):
        spread = leaf.std() if leaf.std() > 1e-6 else 1
        noise = 0.3 * spread * rng.normal(size=leaf.shape)
        moved.append(jnp.asarray(leaf + noise, jnp.float32))
    return model, jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("name", tiny.mostly_slow(VARIANTS, list(VARIANTS)[:1]))
def test_logits_stay(name):
    model, params = uneven(name)
    changes, rotated = rotate_model(model, params, seed=0)
    after = tiny.model(**VARIANTS[name] | changes)
    assert jax.tree.structure(rotated) == jax.tree.structure(tiny.params(after))
    before = logits(model, params)
    np.testing.assert_allclose(logits(after, rotated), before, atol=1e-4, rtol=1e-5)
    assert np.abs(before).max() > 1
    np.testing.assert_allclose(
        rotated["layers"]["mlp_norm"]["scale"], 1 - model.config.norm_offset, atol=1e-6
    )
    up = rotated["layers"]["mlp"]["up"]
    assert np.abs(up - params["layers"]["mlp"]["up"]).max() > 0.05
    # Without the head, or with another rotation of it, nothing fits.
    _, other = rotate_model(model, params, seed=1)
    wrong = logits(after, {**rotated, "head": other["head"]})
    assert np.abs(wrong - before).max() > 0.1


def test_heads_are_an_option():
    name = "grouped, tied, swiglu"
    model, params = uneven(name)
    changes, stream = rotate_model(model, params, seed=0, heads=False)
    _, both = rotate_model(model, params, seed=0)
    query, value = (stream["layers"]["attention"][k] for k in ("query", "value"))
    np.testing.assert_array_equal(query, both["layers"]["attention"]["query"])
    assert np.abs(value - both["layers"]["attention"]["value"]).max() > 0.05
    after = tiny.model(**VARIANTS[name] | changes)
    np.testing.assert_allclose(logits(after, stream), logits(model, params), atol=1e-4)
    mixed = {
        **both,
        "layers": {**both["layers"], "attention": {**both["layers"]["attention"], "value": value}},
    }
    assert np.abs(logits(after, mixed) - logits(model, params)).max() > 0.01


def test_an_outlier_is_spread():
    name = "grouped, tied, swiglu"
    model, params = uneven(name)
    up = params["layers"]["mlp"]["up"].at[:, 5].multiply(50)
    layers = params["layers"] | {"mlp": params["layers"]["mlp"] | {"up": up}}
    _, rotated = rotate_model(model, params | {"layers": layers}, seed=0)

    def peak(w):
        return np.abs(w).max() / np.sqrt(np.square(w).mean())

    before, after = peak(up[0]), peak(rotated["layers"]["mlp"]["up"][0])
    assert before > 8 > 4 > after


def test_dtypes_are_kept():
    model = tiny.model(**GROUPED, tied_head=True, param_dtype="bfloat16", dtype="bfloat16")
    _, rotated = rotate_model(model, tiny.params(model), seed=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(rotated)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm": "layernorm"}, "model.norm=layernorm .* valid: rmsnorm"),
        ({"norm_bias": True}, "model.norm_bias=True .* valid: False"),
        ({"norm_placement": "both"}, "model.norm_placement=both .* valid: before"),
        ({"embedding": "binary"}, "model.embedding=binary .* valid: learned"),
        ({"adapter_rank": 2}, "model.adapter_rank=2: .* merge"),
        ({"width": 26, "heads": 1, "kv_heads": 1}, "model.width=26 cannot be rotated"),
        ({"head_width": 6}, "model.head_width=6 cannot be rotated"),
    ],
)
def test_refuses(overrides, message):
    model = tiny.model(**GROUPED | overrides)
    with pytest.raises(InputError, match=message):
        rotate_model(model, {}, seed=0)
