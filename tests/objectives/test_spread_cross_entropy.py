"""The blocked cross-entropy of a batch or a vocabulary that is spread over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_cross_entropy import (
    ENTROPY,
    Z_LOSS,
    assert_close,
    blocked,
    dense_float64,
    make_inputs,
    weighted_loss,
)

from objectives import cross_entropy
from objectives.cross_entropy import token_statistics


@pytest.mark.parametrize(
    "head_spec",
    tiny.mostly_slow([P(), P("data", None)], (P("data", None),)),
    ids=["replicated", "fsdp"],
)
def test_sharded_batch_equals_single_device(head_spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = make_inputs(8, 4, 16, 90)
    specs = P("data"), head_spec, P("data"), P("data")
    sharded = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(inputs, specs, strict=True)
    ]
    function = functools.partial(weighted_loss, block_size=32)
    compiled = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True)).lower(*sharded).compile()
    (loss, stats), gradients = compiled(*sharded)
    assert_close((loss, stats, gradients), blocked(*inputs, block_size=32), 1e-5)
    assert stats.nll.sharding.spec == P("data")
    # The batch stays where it is: nothing with all of its 8 sequences exists on one device.
    assert "[8,4," not in compiled.as_text()
    assert ("all-gather" in compiled.as_text()) == (head_spec != P())


def spread(shards, *inputs, softcap=0.0, block_size=8):
    """`blocked` of a head whose columns lie on the devices of a mapped axis, rows on the others."""
    mesh = jax.make_mesh((8 // shards, shards), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def local(hidden, head, targets):
        hidden = jax.lax.pcast(hidden, "tensor", to="varying")
        head = jax.lax.pcast(head, "data", to="varying")
        return token_statistics(
            hidden, head, targets, softcap=softcap, block_size=block_size, axis="tensor"
        )

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(None, "tensor"), P("data")), out_specs=P("data")
    )

    def loss(hidden, head, targets, weights):
        stats = mapped(hidden, head, targets)
        # Select before any arithmetic: a token of weight 0 may be NaN.
        nll, lse, entropy = (jnp.where(weights != 0, x, 0.0) for x in stats[:3])
        return (weights * (nll + Z_LOSS * lse**2 + ENTROPY * entropy)).sum(), stats

    (value, stats), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs)
    return value, stats, gradients


@pytest.mark.parametrize(
    ("vocabulary", "shards", "softcap", "block_size"),
    tiny.rows_mostly_slow([(40, 2, 0.0, 7), (40, 4, 3.0, 1024), (8, 8, 0.0, 1)], (1,)),
    ids=str,
)
def test_a_vocabulary_spread_over_devices_is_the_whole_one(vocabulary, shards, softcap, block_size):
    """Values and gradients, the entropy's included, with a NaN token of weight 0."""
    hidden, head, targets, weights = make_inputs(8, 3, 16, vocabulary, scale=4.0)
    weights = weights.at[1, 2].set(0.0)
    expected = dense_float64(hidden, head, targets, weights, softcap)
    options = dict(softcap=softcap, block_size=block_size)
    poisoned = hidden.at[1, 2].set(jnp.nan)
    loss, stats, gradients = spread(shards, poisoned, head, targets, weights, **options)
    assert np.isnan(np.asarray(stats[:4])[:, 1, 2]).all()
    live = np.ones((8, 3), bool)
    live[1, 2] = False
    for got, want in zip(stats[:4], expected[1][:4], strict=True):
        assert_close(np.asarray(got)[live], want[live], 1e-6)
    assert_close((loss, gradients), (expected[0], expected[2]), 1e-5)


def test_a_target_outside_of_a_spread_vocabulary_is_nan():
    hidden, head, targets, weights = make_inputs(8, 3, 16, 40)
    _, stats, _ = spread(4, hidden, head, targets.at[0].set(40).at[1].set(-1), weights)
    assert np.isnan(stats.nll[:2]).all()
    assert np.isfinite(stats.nll[2:]).all()
    assert np.isfinite(stats.entropy).all()


def test_parts_that_are_not_merged_are_other_statistics(monkeypatch):
    """Negative control: the sums of the first device alone."""
    inputs = make_inputs(8, 3, 16, 40)
    expected = dense_float64(*inputs)
    assert_close(spread(4, *inputs)[1], expected[1], 1e-5)

    def first(parts, axis):
        is_first = jax.lax.axis_index(axis) == 0
        return jax.lax.psum(jax.tree.map(lambda x: jnp.where(is_first, x, 0.0), parts), axis)

    monkeypatch.setattr(cross_entropy, "total", first)
    _, stats, gradients = spread(4, *inputs)
    for got, want in ((stats.logsumexp, expected[1].logsumexp), (gradients, expected[2])):
        with pytest.raises(AssertionError):
            assert_close(got, want, 1e-2)


def test_a_spread_vocabulary_needs_a_mapping_that_sums_gradients():
    """Hidden states that are not marked as varying: refused, not summed too little."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    hidden, head, targets, _ = make_inputs(2, 3, 16, 40)
    mapped = jax.shard_map(
        lambda *x: token_statistics(*x, axis="tensor").nll,
        mesh=mesh,
        in_specs=(P(), P(None, "tensor"), P()),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="same type"):
        jax.jit(jax.grad(lambda x: mapped(x, head, targets).sum())).lower(hidden)
