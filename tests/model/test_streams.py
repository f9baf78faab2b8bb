"""What `streams` says about a layer, against the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.errors import InputError
from lm.model.packed_matrix import pack
from lm.model.parameters import MATRICES_BY_INPUT
from lm.model.streams import (
    WRITERS,
    check_changeable,
    gain,
    layer_groups,
    leaf_at,
    residual_embeddings,
    with_gain,
    with_leaves,
)

VARIANTS = {
    "gated": {"activation": "swiglu"},
    "offset, both": {"norm_offset": 1.0, "norm_placement": "both", "activation": "geglu"},
    "heads": {"kv_heads": 4, "parallel_block": True, "attention_bias": "all", "mlp_bias": True},
    "after": {"norm_placement": "after", "norm": "layernorm"},
}


def seen_inputs(model, layer, x_BTD, batch):
    """Name -> input of every matrix of a layer."""
    found = {}

    def product(path, inputs, weights, scale):
        found[path.removeprefix("layers/")] = inputs
        return inputs @ weights

    model.block(layer, x_BTD, batch["positions"], batch["segment_ids"], product)
    return found


@pytest.mark.parametrize("name", tiny.mostly_slow(VARIANTS, ("gated",)))
def test_inputs_follow_what_they_are_said_to_come_from(name):
    """Doubling a norm's gain, or a producer with its bias, doubles the inputs, and nothing else."""
    model = tiny.model(**VARIANTS[name])
    config, batch = model.config, tiny.batch(2, 8)
    params = tiny.params(model)
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    x_BTD = model.embed(params, batch["tokens"], batch["positions"])
    run = jax.jit(lambda layer: seen_inputs(model, layer, x_BTD, batch))
    before = run(layer)
    groups = layer_groups(config)
    assert set(before) == {name for group in groups for name in group.matrices}
    for group, names in zip(groups, MATRICES_BY_INPUT, strict=True):
        assert group.matrices == tuple(n for n in names if n in before)
        if group.norm:
            norm = layer[group.norm]
            changed = {group.norm: with_gain(config, norm, 2 * gain(config, norm))}
        elif group.producer:
            names = (group.producer, f"{group.producer}_bias")
            changed = {n: 2 * leaf_at(layer, n) for n in names if leaf_at(layer, n) is not None}
        else:
            continue
        after = run(with_leaves(layer, changed))
        for matrix in group.matrices:
            np.testing.assert_allclose(after[matrix], 2 * before[matrix], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.mostly_slow(["gated", "after"], ("after",)))
def test_writers_are_all_that_write(name):
    """Without them a layer returns its input."""
    model = tiny.model(**VARIANTS[name])
    batch, params = tiny.batch(2, 8), tiny.params(model)
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    x_BTD = model.embed(params, batch["tokens"], batch["positions"])
    places = batch["positions"], batch["segment_ids"]
    block = jax.jit(lambda layer: model.block(layer, x_BTD, *places))
    without = with_leaves(layer, {n: jnp.zeros_like(leaf_at(layer, n)) for n in WRITERS})
    np.testing.assert_array_equal(block(without), x_BTD)
    assert (block(layer) != x_BTD).any()


def test_residual_embeddings():
    model = tiny.model(positions="learned")
    params = tiny.params(model)
    paths = residual_embeddings(model.config)
    assert paths == ("embedding/table", "positions/table")
    doubled = with_leaves(params, {path: 2 * leaf_at(params, path) for path in paths})
    batch = tiny.batch(2, 8)
    where = batch["tokens"], batch["positions"]
    np.testing.assert_allclose(
        model.embed(doubled, *where), 2 * model.embed(params, *where), rtol=1e-6
    )
    with pytest.raises(InputError, match=r"model.embedding=gaussian .* valid: learned"):
        residual_embeddings(tiny.model(embedding="gaussian").config)


def test_refuses_what_is_no_plain_matrix():
    config = tiny.model().config
    check_changeable(config, {"w": jnp.ones((4, 4))}, "a test")
    with pytest.raises(InputError, match=r"train.frozen: a test needs plain matrices"):
        check_changeable(config, {"w": pack(jnp.ones((64, 4)), "int8")}, "a test")
    with pytest.raises(InputError, match=r"model.adapter_rank=2: a test .* merge"):
        check_changeable(tiny.model(adapter_rank=2).config, {}, "a test")


def test_leaves_by_name():
    tree = {"a": {"b": 1}, "c": 2}
    assert leaf_at(tree, "a/b") == 1
    assert leaf_at(tree, "a/x") is leaf_at(tree, "x/y") is None
    assert with_leaves(tree, {"a/d": 3, "c": 4}) == {"a": {"b": 1, "d": 3}, "c": 4}
    assert tree == {"a": {"b": 1}, "c": 2}
