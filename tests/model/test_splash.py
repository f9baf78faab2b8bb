"""The kernel for TPUs, run as JAX operations, against plain attention; and who gets it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.errors import InputError
from lm.model import attention, splash
from lm.parallel.mesh import RULES, make_mesh
from lm.training import experiment


def arrays(batch=4, heads=4, kv_heads=2, length=256, width=64):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, heads, length, width))
    k, v = (rng.normal(size=(batch, kv_heads, length, width)) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    return *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(segments, jnp.int32)


def value_and_gradients(attend, *given):
    def total(q, k, v, segments):
        out = attend(q, k, v, segments)
        return jnp.sum(out * jnp.cos(out)), out

    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*given)
    return [np.asarray(x) for x in jax.tree.leaves(found)[1:]]


def plain(q, k, v, segments):
    return attention.attend(q, k, v, segments, segments, implementation="einsum")


def on_mesh(sizes, given):
    def kernel(*arrays):
        with nn.logical_axis_rules(RULES):
            return splash.splash_attention(*arrays, interpret=True)

    with jax.set_mesh(make_mesh(sizes, jax.devices())):
        return value_and_gradients(kernel, *given)


def test_the_kernel_on_a_mesh_equals_plain_attention_and_so_do_its_gradients():
    q, k, v, segments = arrays()

    found = on_mesh({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, (q, k, v, segments))
    for ours, expected in zip(found, value_and_gradients(plain, q, k, v, segments), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-5)
    # Negative control: with the segments of another row the result is another one.
    others = value_and_gradients(plain, q, k, v, segments[::-1])
    assert np.abs(found[0] - others[0]).max() > 0.1


SHARDED = [
    ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, True),
    # Halves of 64 queries are no tile: nothing is exchanged.
    ({"data": 1, "fsdp": 1, "tensor": 2, "sequence": 4}, False),
]


@pytest.fixture(scope="module")
def long_row():
    """Queries, keys, values and segments, and what plain attention on one device makes of them."""
    given = arrays(batch=2, length=512)
    return given, value_and_gradients(plain, *given)


def farthest(found, expected):
    """Of the value and each gradient the largest difference, over the largest element."""
    pairs = zip(found, expected, strict=True)
    return [np.abs(ours - theirs).max() / np.abs(theirs).max() for ours, theirs in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "exchanges"), SHARDED, ids=str)
def test_a_length_over_devices_gives_the_values_and_gradients_of_one(sizes, exchanges, long_row):
    given, expected = long_row
    assert splash.balanced(512, sizes["sequence"]) == exchanges
    assert max(farthest(on_mesh(sizes, given), expected)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["each device from 0", "not exchanged"])
def test_queries_at_wrong_positions_give_other_values_and_gradients(wrong, long_row, monkeypatch):
    # Of one segment: a query at a wrong place sees keys all the same, though others.
    given = (*long_row[0][:3], jnp.zeros((2, 512), jnp.int32))
    order = np.arange(512, dtype=np.int32)
    order = order % 256 if wrong == "each device from 0" else order
    monkeypatch.setattr(splash, "query_order", lambda length, shards: order)
    found = on_mesh(SHARDED[0][0], given)
    assert min(farthest(found, value_and_gradients(plain, *given))) > 0.01


@pytest.mark.parametrize(("length", "shards"), [(2048, 8), (512, 2), (768, 3), (512, 4), (128, 1)])
def test_every_device_computes_as_many_pairs_where_halves_are_tiles(length, shards):
    order = splash.query_order(length, shards).reshape(shards, -1)
    assert sorted(order.reshape(-1)) == list(range(length))
    pairs = (order + 1).sum(1)
    # By the formula a tile on the diagonal counts half.
    worst, expected = pairs.max() / pairs.mean(), splash.imbalance(length, shards)
    assert worst == pytest.approx(expected, abs=shards / length)
    assert (expected == 1) == (shards == 1 or length % (256 * shards) == 0)


def test_the_mask_by_its_corners_is_the_mask_by_its_elements(monkeypatch):
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    ours = splash._make_kernel(splash.query_order(1024, 2), 2, 2, 128, interpret=True)
    # A device has 4 tiles of queries; among 8 of keys, 0, 1, 6 and 7 are the last ones it sees.
    assert ours.fwd_mask_info.block_mask.shape == (1, 8, 8)
    seen = (np.asarray(ours.fwd_mask_info.block_mask)[0] > 0).sum(1)
    np.testing.assert_array_equal(seen, [1, 2, 7, 8, 5, 6, 3, 4])
    rows = splash._make_kernel(np.arange(1024, dtype=np.int32), 2, 1, 128, interpret=True)
    monkeypatch.setattr(splash, "_value", lambda positions, keys: None)
    slow = splash._make_kernel(splash.query_order(1024, 2), 2, 2, 128, interpret=True)
    for kernel, expected in (
        (ours, slow),
        (
            rows,
            kernels.make_splash_mha(
                kernels.MultiHeadMask([kernels.CausalMask((1024, 1024))] * 2),
                block_sizes=kernels.BlockSizes(*8 * (128,)),
                head_shards=1,
                q_seq_shards=1,
            ),
        ),
    ):
        for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


SIZES = {"length": 256, "heads": 8, "kv_heads": 4, "head_width": 64, "mesh": {}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"head_width": 128, "mesh": {"data": 2, "fsdp": 4, "tensor": 4, "sequence": 1}}, ""),
        ({"length": 200}, "data.sequence_length=200"),
        ({"head_width": 32}, "= 32 is not"),
        ({"mesh": {"sequence": 2}}, ""),
        ({"mesh": {"sequence": 4}}, "=256 / mesh.sequence=4 is not a multiple of 128"),
        ({"mesh": {"tensor": 8}}, "model.kv_heads=4 is not divisible by mesh.tensor=8"),
    ],
)
def test_sizes_that_the_kernel_cannot_have_are_named(change, expected):
    reason = splash.refusal(**(SIZES | change))
    assert (expected in reason) if expected else reason == ""


def test_a_config_that_cannot_have_it_is_refused_before_anything_is_compiled():
    c = tiny.config(model__width=256, data__sequence_length=128, model__attention="splash")
    experiment.build(c, tiny.VOCAB, 1)  # a plan, for no device in particular
    with pytest.raises(InputError, match="runs on TPUs only"):
        experiment.build(c, tiny.VOCAB, jax.devices()[:1])
    c.data.sequence_length = 100
    with pytest.raises(InputError, match=r"splash: data\.sequence_length=100"):
        experiment.build(c, tiny.VOCAB, 1)


def test_explicit_splash_refuses_blocks_and_gives_decoding_to_einsum():
    q, k, v, segments = arrays(length=128)
    with pytest.raises(InputError, match="no blocks"):
        attention.attend(q, k, v, segments, segments, blocks_BT=segments, implementation="splash")
    row = (q[:, :, 5:6], k, v, segments[:, 5:6], segments)
    out = attention.attend(*row, offset=5, implementation="splash")
    np.testing.assert_allclose(out, attention.attend(*row, offset=5, implementation="einsum"))


def test_auto_is_of_the_devices_of_the_mesh():
    q, k, *_ = arrays(length=128)
    assert attention._best(q, k, True, False) == "einsum"
