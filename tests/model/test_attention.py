import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.model import attention
from lm.model.platform import platform
from objectives.losses.block_distillation import block_ids


def arrays(batch=2, heads=4, kv_heads=2, length=70, width=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, heads, length, width))
    key, value = (rng.normal(size=(batch, kv_heads, length, width)) for _ in range(2))
    segments = np.sort(rng.integers(0, 3, (batch, length)), axis=1)
    return *(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.asarray(segments, jnp.int32)


def reference(query, key, value, segments):
    """The whole square of logits at once, in float64."""
    query, key, value, segments = (np.asarray(x) for x in (query, key, value, segments))
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    logits = query @ np.swapaxes(key, 2, 3) / np.sqrt(query.shape[-1])
    seen = np.tri(logits.shape[2], dtype=bool) & (segments[:, :, None] == segments[:, None])
    weights = np.exp(logits - logits.max()) * seen[:, None]
    return weights @ value / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("length", tiny.mostly_slow([1, 2, 64, 70, 130], (1, 70)))
@pytest.mark.parametrize("kv_heads", tiny.mostly_slow([1, 2, 4], (2,)))
def test_equals_float64_reference(length, kv_heads):
    x = arrays(length=length, kv_heads=kv_heads)
    out = attention.attend(*x, x[3], implementation="einsum")
    np.testing.assert_allclose(out, reference(*x), atol=2e-6)


@pytest.mark.slow
def test_implementations_agree_and_so_do_their_gradients():
    q, k, v, segments = arrays()

    def total(implementation, q, k, v):
        out = attention.attend(q, k, v, segments, segments, implementation=implementation)
        return jnp.sum(out * jnp.cos(out))

    ours = jax.grad(total, argnums=(1, 2, 3))("einsum", q, k, v)
    jaxs = jax.grad(total, argnums=(1, 2, 3))("xla", q, k, v)
    for a, b in zip(ours, jaxs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [128, 70])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cudnn_equals_einsum_and_so_do_its_gradients(length, kv_heads):
    if platform() != "gpu":
        pytest.skip("cuDNN is for GPUs")
    q, k, v, segments = arrays(kv_heads=kv_heads, length=length, width=64, dtype=jnp.bfloat16)

    def total(implementation, seen, q, k, v):
        out = attention.attend(q, k, v, seen, seen, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(out.astype(jnp.float32)))

    def gradients(implementation, seen):
        found = jax.jit(jax.grad(total, (2, 3, 4)), static_argnums=0)(implementation, seen, q, k, v)
        return [np.asarray(x, np.float32) for x in found]

    ours = gradients("einsum", segments)
    cudnn, blind = gradients("cudnn", segments), gradients("cudnn", jnp.zeros_like(segments))
    out = attention.attend(q, k, v, segments, segments, implementation="cudnn")
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v, segments), atol=0.03)
    for a, b, c in zip(ours, cudnn, blind, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())
        assert np.abs(a - c).max() > 0.2 * np.abs(a).max()


def test_without_segments_the_result_differs():
    """Negative control: a kernel that ignored segment ids would fail the tests above."""
    q, k, v, segments = arrays()
    out = attention.attend(q, k, v, jnp.zeros_like(segments), jnp.zeros_like(segments))
    assert np.abs(np.asarray(out) - reference(q, k, v, segments)).max() > 0.1


def test_one_query_at_an_offset_equals_its_row():
    q, k, v, segments = arrays(length=12)
    whole = attention.attend(q, k, v, segments, segments)
    for t in (0, 5, 11):
        row = attention.attend(q[:, :, t : t + 1], k, v, segments[:, t : t + 1], segments, offset=t)
        np.testing.assert_allclose(row[:, :, 0], whole[:, :, t], atol=1e-6)


def test_bfloat16_is_near_float32():
    x = arrays(dtype=jnp.bfloat16)
    out = attention.attend(*x, x[3], implementation="einsum")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(*x), atol=0.03)


def test_huge_logits_stay_finite():
    q, k, v, segments = arrays()
    out, grad = jax.value_and_grad(lambda q: attention.attend(q, k, v, segments, segments).sum())(
        q * 1e4
    )
    assert np.isfinite(out)
    assert np.isfinite(grad).all()


def test_block_ids_count_from_the_start_of_each_document():
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0], [7, 8, 9, 0, 1, 2, 3, 4, 0, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3], [1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0]])
    last = attention.LAST_BLOCK
    np.testing.assert_array_equal(
        block_ids(positions, segments, 3),
        [
            [0, 0, 0, 1, 1, 1, last, last, last, last, last],
            [2, 2, last, 0, 0, 0, last, last, last, last, last],
        ],
    )


@pytest.mark.parametrize("implementation", ["einsum", "xla"])
def test_blocks_do_not_see_each_other_but_for_the_last(implementation):
    q, k, v, segments = arrays(length=130)
    positions = jnp.asarray(
        [np.concatenate([np.arange(n) for n in np.bincount(row)]) for row in np.asarray(segments)]
    )
    blocks = block_ids(positions, segments, 10)
    out = attention.attend(
        q, k, v, segments, segments, blocks_BT=blocks, implementation=implementation
    )
    # Cut into its own document, a block is attention as usual; a last block sees all before.
    cut = segments * 1000 + positions // 10
    last = np.asarray(blocks == attention.LAST_BLOCK)[:, None, :, None]
    expected = np.where(last, reference(q, k, v, segments), reference(q, k, v, cut))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert last.any()
    assert not last.all()
    # One block is no blocks, and they change something.
    whole = attention.attend(q, k, v, segments, segments, implementation=implementation)
    one = attention.attend(
        q,
        k,
        v,
        segments,
        segments,
        blocks_BT=block_ids(positions, segments, 130),
        implementation=implementation,
    )
    np.testing.assert_array_equal(one, whole)
    assert np.abs(out - whole).max() > 0.1
