"""AWQ of a whole model: what is folded changes nothing, and what is searched is the real output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.after_training import round_to_nearest_model
from lm.compression.awq import apply_awq, awq_model, search_awq
from lm.compression.phases import default_rules
from lm.errors import InputError
from lm.model.streams import layer_groups, leaf_at
from objectives.quantization import minmax, round_to_nearest

RULES = default_rules(3, minmax, granularity="group", group_size=8)
SMALL = {"width": 16, "heads": 2, "mlp_width": 24}
VARIANTS = {
    "every group": {
        **SMALL,
        "kv_heads": 2,
        "activation": "swiglu",
        "attention_bias": "all",
        "mlp_bias": True,
        "norm": "layernorm",
        "norm_offset": 1.0,
    },
    "grouped, both": {**SMALL, "kv_heads": 1, "norm_placement": "both", "parallel_block": True},
    "after": {**SMALL, "kv_heads": 2, "norm_placement": "after", "activation": "geglu"},
}
BATCHES = [tiny.batch(2, 12, seed) for seed in range(2)]


@functools.cache
def outliers(name):
    """A model, and parameters with a few large channels in its norms and uneven biases."""
    model = tiny.model(**VARIANTS[name])
    leaves, structure = jax.tree.flatten(tiny.params(model))
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 2 and leaf.shape[0] == model.config.layers:
            large = np.where(rng.random(leaf.shape) < 0.1, 10, 1)
            leaves[i] = (
                leaf + model.config.norm_offset + 0.1 * rng.normal(size=leaf.shape)
            ) * large
    return model, jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in leaves])


@functools.cache
def found(name):
    model, params = outliers(name)
    return search_awq(model, params, BATCHES, RULES)


@functools.cache
def _run(model):
    def run(params, batch):
        return tiny.hidden(model, params, batch) @ model.head(params)

    return jax.jit(run)


def logits(model, params, batch=BATCHES[0]):
    return _run(model)(params, batch)


def captured(model, params, batch):
    """(layer, name) -> (input, output without bias) of every matrix, layers as they are."""
    seen, x = {}, model.embed(params, batch["tokens"], batch["positions"])
    for index in range(model.config.layers):
        layer = jax.tree.map(lambda a, i=index: a[i], params["layers"])

        def product(path, inputs, weights, scale, index=index):
            seen[index, path.removeprefix("layers/")] = inputs, inputs @ weights
            return inputs @ weights

        x = model.block(layer, x, batch["positions"], batch["segment_ids"], product)
    return seen


PLACES = {
    "every group": {"attention/query", "attention/output", "mlp/up", "mlp/down"},
    "grouped, both": {"attention/query", "mlp/up"},
    "after": {"attention/output", "mlp/down"},
}


@pytest.mark.parametrize("name", tiny.mostly_slow(VARIANTS, ["every group"]))
def test_scales_change_nothing(name):
    model, params = outliers(name)
    scales = found(name).scales
    assert set(scales) == PLACES[name]
    assert all(np.ptp(s, axis=1).max() > 0.05 for s in scales.values())
    folded = apply_awq(model, params, found(name)._replace(limits={}), RULES)
    before = logits(model, params)
    np.testing.assert_allclose(logits(model, folded), before, atol=1e-4, rtol=1e-5)
    # With one of the two sides left out there are other logits.
    for module, leaf in (("attention", "value"), ("mlp", "up")):
        part = {**folded["layers"][module], leaf: params["layers"][module][leaf]}
        wrong = {**folded, "layers": {**folded["layers"], module: part}}
        if (folded["layers"][module][leaf] != params["layers"][module][leaf]).any():
            assert np.abs(logits(model, wrong) - before).max() > 1e-2


def test_losses_are_those_of_the_real_output():
    """Ratio 0 against the model run by hand with rounded weights, and every loss against it."""
    model, params = outliers("every group")
    result = found("every group")
    assert all((losses.min(1) <= losses[:, 0]).all() for losses in result.losses.values())
    assert any((losses.min(1) < 0.9 * losses[:, 0]).any() for losses in result.losses.values())
    groups = layer_groups(model.config)

    @jax.jit
    def by_hand(params, batch):
        layers, losses = params["layers"], {}
        full = captured(model, params, batch)
        for group in groups:
            for index in range(2):
                rounded = layers
                for n in group.matrices:
                    module, leaf = n.split("/")
                    q = round_to_nearest(leaf_at(layers, n), RULES(f"layers/{n}"))
                    q = leaf_at(layers, n).at[index].set(q[index])
                    rounded = {**rounded, module: {**rounded[module], leaf: q}}
                got = captured(model, {**params, "layers": rounded}, batch)
                key = (index, group.result)
                losses[index, group.matrices[0]] = jnp.square(full[key][1] - got[key][1]).mean()
        return losses

    every = [by_hand(params, batch) for batch in BATCHES]
    for (index, name), first in every[0].items():
        expected = (first + every[1][index, name]) / 2
        np.testing.assert_allclose(result.losses[name][index, 0], expected, rtol=1e-2)


def test_fewer_bits_hurt_less():
    model, params = outliers("every group")
    result, held_out = found("every group"), tiny.batch(2, 12, seed=9)
    ready = apply_awq(model, params, result, RULES)
    folded = apply_awq(model, params, result._replace(limits={}), RULES)
    full = logits(model, params, held_out)
    nearest, scaled, clipped = (
        np.square(logits(model, round_to_nearest_model(p, RULES).params, held_out) - full).mean()
        for p in (params, folded, ready)
    )
    assert scaled < 0.8 * nearest
    assert clipped < 0.8 * nearest
    # Clipped: all matrices but those that are compared through a softmax.
    for n in ("attention/query", "attention/key", "attention/value", "mlp/down"):
        same = leaf_at(ready["layers"], n) == leaf_at(folded["layers"], n)
        assert bool(same.all()) == (n in ("attention/query", "attention/key")), n


@pytest.mark.slow
def test_importance_and_padding():
    """Weights of one row are a search on that row; a row of padding is no row."""
    model, params = outliers("grouped, both")
    batch = BATCHES[0]
    first = jax.tree.map(lambda a: a[:1], batch)
    padded = {**batch, "segment_ids": batch["segment_ids"].at[1].set(0)}
    calls = []

    def one_row(block, rounded, inputs, batch):
        calls.append(1)
        assert block(inputs).shape == rounded(inputs).shape == (*inputs.shape[:2], 16)
        return jnp.ones(inputs.shape[:2]).at[1].set(0)

    for error in ("squared", "absolute"):
        options = {"error": error, "clip": False}
        want = search_awq(model, params, [first], RULES, **options)
        got = search_awq(model, params, [padded], RULES, **options)
        other = search_awq(model, params, [batch], RULES, **options)
        weighted = search_awq(model, params, [batch], RULES, importance=one_row, **options)
        for n, losses in want.losses.items():
            np.testing.assert_allclose(got.losses[n], losses, rtol=1e-3)
            # The statistic of inputs counts all tokens, so that other ratios have other losses.
            np.testing.assert_allclose(weighted.losses[n][:, 0], losses[:, 0], rtol=1e-3)
            assert np.abs(other.losses[n][:, 0] / losses[:, 0] - 1).max() > 1e-3
    assert len(calls) == 2 * 2  # groups, errors


@pytest.mark.slow
def test_tokens_and_rules():
    model, params = outliers("grouped, both")
    few = search_awq(model, params, BATCHES, RULES, tokens=12, clip=False)
    # One row of the four.
    same = search_awq(model, params, [jax.tree.map(lambda a: a[:1], BATCHES[0])], RULES, clip=False)
    np.testing.assert_array_equal(few.losses["mlp/up"], same.losses["mlp/up"])

    def mlp_only(path):
        return RULES(path) if "mlp" in path else None

    only = search_awq(model, params, BATCHES, mlp_only)
    assert set(only.scales) == {"mlp/up"}
    assert set(only.limits) == {"mlp/up", "mlp/down"}
    nothing = awq_model(model, params, BATCHES, lambda path: None)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), nothing, params)))


def test_refuses():
    model, params = outliers("every group")
    broken = jax.tree.map(lambda a: a, params) | {
        "embedding": {"table": jnp.nan * params["embedding"]["table"]}
    }
    with pytest.raises(InputError, match="AWQ: layer 0 has outputs that are not finite"):
        search_awq(model, broken, BATCHES, RULES)
    with pytest.raises(InputError, match=r"model.adapter_rank=2: AWQ needs"):
        search_awq(tiny.model(adapter_rank=2), {}, BATCHES, RULES)
