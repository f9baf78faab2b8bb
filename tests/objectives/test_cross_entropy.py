"""The blocked cross-entropy is the dense one: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.cross_entropy import TokenStatistics, token_statistics

# Coefficients of nll, logsumexp^2 and entropy in the losses below.
Z_LOSS, ENTROPY = 0.05, 0.3

statistics = jax.jit(token_statistics, static_argnames=("softcap", "block_size"))


def make_inputs(batch, length, width, vocabulary, dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.standard_normal((batch, length, width))
    head = rng.standard_normal((width, vocabulary)) / np.sqrt(width)
    targets = rng.integers(0, vocabulary, (batch, length))
    weights = rng.uniform(0.1, 2.0, (batch, length))
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(head, dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def dense_float64(hidden, head, targets, weights, softcap=0.0, tanh_slope=True):
    """Statistics and (dhidden, dhead) of the weighted loss, written out in NumPy float64."""
    x, w, a = (
        np.asarray(array.astype(jnp.float32), np.float64) for array in (hidden, head, weights)
    )
    z = x @ w
    slope = 1.0
    if softcap:
        z = softcap * np.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2 if tanh_slope else 1.0
    maximum = z.max(-1, keepdims=True)
    lse = np.log(np.exp(z - maximum).sum(-1, keepdims=True)) + maximum
    p = np.exp(z - lse)
    y = np.eye(w.shape[1])[np.asarray(targets)]
    nll = lse[..., 0] - (z * y).sum(-1)
    entropy = -(p * (z - lse)).sum(-1)
    dz = p - y + Z_LOSS * 2 * lse * p - ENTROPY * p * (z - lse + entropy[..., None])
    dz *= a[..., None] * slope
    loss = (a * (nll + Z_LOSS * lse[..., 0] ** 2 + ENTROPY * entropy)).sum()
    gradients = dz @ w.T, np.einsum("btd,btv->dv", x, dz)
    return loss, TokenStatistics(nll, lse[..., 0], entropy, -nll), gradients


def weighted_loss(hidden, head, targets, weights, **options):
    stats = token_statistics(hidden, head, targets, **options)
    loss = weights * (stats.nll + Z_LOSS * stats.logsumexp**2 + ENTROPY * stats.entropy)
    return loss.sum(), stats


def blocked(*inputs, **options):
    function = functools.partial(weighted_loss, **options)
    (loss, stats), gradients = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(*inputs)
    return loss, stats, gradients


def assert_close(actual, expected, tolerance):
    """Each array within `tolerance` of the largest entry that is expected of it."""
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        want = np.asarray(want, np.float64)
        scale = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale
        )


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "block", "softcap"),
    tiny.rows_mostly_slow(
        [
            (6, 8, 2, 1024, 0.0),
            (6, 8, 2, 1, 0.0),
            (5, 3, 7, 7, 1.5),
            (12, 16, 50, 64, 0.0),
            (12, 16, 64, 16, 1.5),
            (9, 5, 131, 32, 0.0),
            (16, 32, 1025, 256, 1.5),
        ],
        (1, 2, 6),
    ),
)
def test_equals_float64_dense(tokens, width, vocabulary, block, softcap):
    inputs = make_inputs(1, tokens, width, vocabulary)
    actual = blocked(*inputs, softcap=softcap, block_size=block)
    assert_close(actual, dense_float64(*inputs, softcap=softcap), 1e-5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual[1]))


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(2, 70),
    st.integers(1, 80),
    st.integers(0, 2**16),
)
def test_any_shape(batch, length, width, vocabulary, block, seed):
    inputs = make_inputs(batch, length, width, vocabulary, seed=seed)
    assert_close(blocked(*inputs, block_size=block), dense_float64(*inputs), 1e-5)


def test_equals_optax():
    hidden, head, targets, _ = make_inputs(2, 16, 24, 300)

    def dense(hidden, head):
        nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return nll.sum(), nll

    def ours(hidden, head):
        nll = token_statistics(hidden, head, targets, block_size=128).nll
        return nll.sum(), nll

    actual = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(hidden, head)
    assert_close(actual, expected, 1e-5)
    # Negative control: another token's loss is far away.
    assert relative_error(actual[0][1], np.roll(expected[0][1], 1, axis=1)) > 1e-2


def test_softcap_gradient_has_the_tanh_derivative():
    inputs = make_inputs(2, 8, 16, 90, scale=2.0)
    _, _, gradients = blocked(*inputs, softcap=1.0, block_size=32)
    _, _, right = dense_float64(*inputs, softcap=1.0)
    _, _, without = dense_float64(*inputs, softcap=1.0, tanh_slope=False)
    for got, want, wrong in zip(gradients, right, without, strict=True):
        assert relative_error(got, want) < 1e-5
        assert relative_error(got, wrong) > 0.1


@pytest.mark.parametrize("softcap", tiny.mostly_slow([0.0, 2.0], (2.0,)))
@pytest.mark.parametrize("field", TokenStatistics._fields[:4])
def test_gradient_of_each_statistic_by_finite_differences(field, softcap):
    hidden, head, targets, weights = make_inputs(1, 4, 6, 21)

    def ours(hidden, head):
        stats = token_statistics(hidden, head, targets, softcap=softcap, block_size=8)
        return (weights * getattr(stats, field)).sum()

    def dense(x, w):
        z = x @ w
        z = softcap * np.tanh(z / softcap) if softcap else z
        lse = np.log(np.exp(z).sum(-1))
        log_p = z - lse[..., None]
        log_y = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        values = TokenStatistics(-log_y, lse, entropy, log_y)
        return (np.asarray(weights, np.float64) * getattr(values, field)).sum()

    rng = np.random.default_rng(1)
    point = [np.asarray(array, np.float64) for array in (hidden, head)]
    direction = [rng.standard_normal(array.shape) for array in point]
    step = 1e-5
    ahead, behind = (
        dense(*(a + sign * step * d for a, d in zip(point, direction, strict=True)))
        for sign in (1, -1)
    )
    gradients = jax.jit(jax.grad(ours, (0, 1)))(hidden, head)
    slope = sum((np.asarray(g) * d).sum() for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-4, abs=1e-4)
    assert abs(slope) > 1e-2


@pytest.mark.parametrize("vocabulary", [2, 10, 50_304])
def test_zero_hidden_is_uniform(vocabulary):
    # A vocabulary padded with zero logits instead of masked gives ln 12 for V=10 and block 4.
    _, head, targets, _ = make_inputs(1, 3, 4, vocabulary)
    block_size = 4096 if vocabulary > 10 else 4
    stats = statistics(jnp.zeros((1, 3, 4)), head, targets, block_size=block_size)
    expected = np.full((1, 3), np.log(vocabulary), np.float32)
    for field in ("nll", "logsumexp", "entropy"):
        np.testing.assert_array_max_ulp(np.asarray(getattr(stats, field)), expected, maxulp=1)


def test_permuting_the_vocabulary():
    hidden, head, targets, weights = make_inputs(2, 6, 8, 45)
    order = np.random.default_rng(3).permutation(45)
    permuted_targets = jnp.asarray(np.argsort(order), jnp.int32)[targets]
    run = functools.partial(blocked, block_size=16)
    loss, stats, (dhidden, dhead) = run(hidden, head, targets, weights)
    permuted = run(hidden, head[:, order], permuted_targets, weights)
    assert_close(permuted, (loss, stats, (dhidden, dhead[:, order])), 1e-6)
    assert relative_error(permuted[2][1], np.asarray(dhead, np.float64)) > 0.1


def test_dlogits_are_weight_times_p_minus_y():
    # With the identity as head, hidden states are the logits, and so are their gradients.
    logits, _, targets, weights = make_inputs(2, 5, 20, 20)
    weights = weights.at[0, 1].set(0.0).at[1, 2].set(-0.5)

    def loss(logits):
        return (weights * token_statistics(logits, jnp.eye(20), targets, block_size=8).nll).sum()

    expected = weights[..., None] * (jax.nn.softmax(logits) - jax.nn.one_hot(targets, 20))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), expected, atol=1e-6)


@pytest.mark.parametrize("poison", tiny.mostly_slow([np.nan, np.inf, 3e38], (np.inf,)))
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_zero_weight_token_contributes_exactly_zero(poison, softcap):
    hidden, head, targets, weights = make_inputs(2, 4, 8, 30)
    weights = weights.at[0, 2].set(0.0)
    poisoned = hidden.at[0, 2].set(poison)

    def loss(hidden, head, weights):
        stats = token_statistics(hidden, head, targets, softcap=softcap, block_size=8)
        # Each statistic is selected before it is squared: select(w != 0, x**2, 0) has the
        # cotangent 0 * 2x, which is NaN where x is.
        nll, logsumexp, entropy, _ = (jnp.where(weights != 0, array, 0) for array in stats[:4])
        return (weights * (nll + Z_LOSS * logsumexp**2 + ENTROPY * entropy)).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    dhidden, dhead = gradient(poisoned, head, weights)
    clean_dhidden, clean_dhead = gradient(hidden, head, weights)
    assert not np.any(dhidden[0, 2])
    assert np.all(np.isfinite(dhidden))
    np.testing.assert_array_equal(dhidden, clean_dhidden)
    np.testing.assert_array_equal(dhead, clean_dhead)
    if np.isnan(poison):  # Negative control: with a weight the token poisons the head.
        _, dhead = gradient(poisoned, head, weights.at[0, 2].set(1e-3))
        assert np.all(np.isnan(dhead))


def test_no_live_token_no_gradient_even_from_a_broken_head():
    hidden, head, targets, _ = make_inputs(1, 4, 8, 30)
    head = head.at[3, 17].set(jnp.inf)

    def loss(hidden, head, weights):
        return (weights * token_statistics(hidden, head, targets, block_size=8).nll).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    assert not any(np.any(array) for array in gradient(hidden, head, jnp.zeros((1, 4))))
    assert all(np.any(np.isnan(array)) for array in gradient(hidden, head, jnp.ones((1, 4))))


def test_large_logits_are_finite_and_right():
    hidden, head, targets, weights = make_inputs(2, 6, 8, 60, scale=1e4)
    assert float(jnp.abs(hidden @ head).max()) > 1e4
    actual = blocked(hidden, head, targets, weights, block_size=16)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    assert_close(actual[1], dense_float64(hidden, head, targets, weights)[1], 1e-5)


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_low_precision_within_the_documented_tolerance(hidden_dtype, head_dtype):
    hidden, head, targets, weights = make_inputs(4, 16, 64, 300, jnp.bfloat16)
    inputs = hidden.astype(hidden_dtype), head.astype(head_dtype), targets, weights
    loss, stats, (dhidden, dhead) = blocked(*inputs, block_size=128)
    assert all(leaf.dtype == jnp.float32 for leaf in stats[:4])
    assert dhidden.dtype == hidden_dtype
    assert dhead.dtype == head_dtype
    assert_close((loss, stats, (dhidden, dhead)), dense_float64(*inputs), 1e-2)
    # Sums are float32: the statistics of bfloat16 inputs are exact far below bfloat16's 2^-8.
    assert_close(stats, dense_float64(*inputs)[1], 1e-5)


def test_target_outside_the_vocabulary_is_nan_and_only_its_nll():
    hidden, head, targets, _ = make_inputs(1, 4, 8, 30)
    clean = statistics(hidden, head, targets, block_size=8)
    for target in (-1, -100, 30):
        stats = statistics(hidden, head, targets.at[0, 1].set(target), block_size=8)
        np.testing.assert_array_equal(np.isnan(stats.nll), [[False, True, False, False]])
        np.testing.assert_array_equal(stats.logsumexp, clean.logsumexp)
        np.testing.assert_array_equal(stats.entropy, clean.entropy)


def test_under_checkpoint():
    inputs = make_inputs(2, 4, 8, 30)
    function = functools.partial(weighted_loss, block_size=8)
    plain = jax.jit(jax.grad(function, (0, 1), has_aux=True))(*inputs)
    remat = jax.jit(jax.grad(jax.checkpoint(function), (0, 1), has_aux=True))(*inputs)
    assert_close(remat, plain, 1e-6)


def test_under_scan_gradient_accumulation():
    hidden, head, targets, weights = make_inputs(4, 4, 8, 30)
    gradient = jax.grad(functools.partial(weighted_loss, block_size=8), 1, has_aux=True)

    @jax.jit
    def accumulate(head):
        def add(total, micro_batch):
            x, y, w = micro_batch
            return total + gradient(x[None], head, y[None], w[None])[0], None

        return jax.lax.scan(add, jnp.zeros_like(head), (hidden, targets, weights))[0]

    whole = jax.jit(gradient)(hidden, head, targets, weights)[0]
    assert_close(accumulate(head), whole, 1e-5)


def temporary_bytes(function, tokens, width, vocabulary):
    hidden = jax.ShapeDtypeStruct((8, tokens // 8, width), jnp.float32)
    head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(hidden, head, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def mean_nll(hidden, head, targets):
    return token_statistics(hidden, head, targets).nll.mean()


def mean_of_everything(hidden, head, targets):
    stats = token_statistics(hidden, head, targets)
    return (stats.nll + stats.logsumexp**2 + stats.entropy).mean()


def dense_mean_nll(hidden, head, targets):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets).mean()


def test_no_array_of_tokens_by_vocabulary():
    sizes = dict(tokens=1024, width=64, vocabulary=131_072)
    bound = 4 * sizes["tokens"] * sizes["vocabulary"] / 20
    assert temporary_bytes(mean_nll, **sizes) < bound
    assert temporary_bytes(mean_of_everything, **sizes) < bound
    # Negative control.
    assert temporary_bytes(dense_mean_nll, **sizes) > bound


def test_an_unused_entropy_costs_no_memory():
    sizes = dict(tokens=1024, width=64, vocabulary=8192)
    assert temporary_bytes(mean_nll, **sizes) < 0.9 * temporary_bytes(mean_of_everything, **sizes)


@pytest.mark.slow
def test_memory_at_full_size_is_a_fiftieth_of_the_dense():
    sizes = dict(tokens=8192, width=512, vocabulary=131_072)
    dense = temporary_bytes(dense_mean_nll, **sizes)
    assert temporary_bytes(mean_nll, **sizes) < dense / 50
    assert temporary_bytes(mean_of_everything, **sizes) < dense / 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=jnp.zeros((4, 8))), "hidden must be"),
        (dict(head=jnp.zeros((30, 8))), "hidden must be"),
        (dict(head=jnp.zeros((8, 0))), "empty vocabulary"),
        (dict(targets=jnp.zeros((4, 1), jnp.int32)), "targets must be"),
        (dict(targets=jnp.zeros((1, 4))), "targets must be integers"),
        (dict(hidden=jnp.zeros((1, 4, 8), jnp.float16)), "hidden must be float32"),
        (dict(head=jnp.zeros((8, 30), jnp.int8)), "head must be float32"),
        (dict(softcap=-1.0), "softcap"),
        (dict(softcap=float("nan")), "softcap"),
        (dict(block_size=-1), "block_size"),
    ],
)
def test_refuses(change, message):
    arguments = dict(
        hidden=jnp.zeros((1, 4, 8)), head=jnp.zeros((8, 30)), targets=jnp.zeros((1, 4), jnp.int32)
    )
    with pytest.raises(ValueError, match=message):
        token_statistics(**(arguments | change))
