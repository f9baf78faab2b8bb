"""The searches of AWQ against float64, brute force and limit cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.quantization import absmax, minmax, round_to_nearest
from objectives.quantization.awq import (
    awq_scale,
    clip_weights,
    magnitude,
    output_error,
    scaled_rounding,
    search_clip,
    search_scale,
)

QUANTIZER = minmax(bits=3, granularity="group", group_size=8)


def problem(tokens=64, inputs=24, outputs=16, seed=0, salient=50.0):
    """Inputs [T, I] with one channel that is much larger, and weights [I, O]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) * np.exp(0.3 * rng.normal(size=inputs))
    x[:, 5] *= salient
    return x.astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


def search(x, w, quantizer=QUANTIZER):
    def loss(scale):
        got = jnp.matmul(x, scaled_rounding(w, scale, quantizer), precision="highest")
        return output_error(x @ w, got, jnp.ones(len(x)))

    return jax.jit(lambda: search_scale(loss, magnitude(x)))()


def rounded64(w, group=8, bits=3):
    """The asymmetric quantizer in float64: a loop over groups and output channels."""
    q = np.zeros_like(w)
    for start in range(0, len(w), group):
        for o in range(w.shape[1]):
            part = w[start : start + group, o]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / (2**bits - 1)
            zero = -np.round(low / scale)
            codes = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            q[start : start + group, o] = scale * (codes - zero)
    return q


def test_scale_search_in_float64():
    x, w = problem(salient=6.0)
    found = search(x, w)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    losses, scales = [], []
    for i in range(20):
        s = np.maximum(np.abs(x64).mean(0) ** (i / 20), 1e-4)
        s /= np.sqrt(s.max() * s.min())
        error = x64 @ w64 - (x64 / s) @ rounded64(w64 * s[:, None])
        losses.append(np.square(error).mean())
        scales.append(s)
    # A weight that lies halfway between two levels may go either way in float32.
    np.testing.assert_allclose(found.losses, losses, rtol=0.05)
    best = int(np.argmin(losses))
    assert best > 0
    np.testing.assert_allclose(found.scale, scales[best], rtol=1e-5)
    # Another choice of the statistic is another scale.
    assert np.abs(awq_scale(jnp.abs(x).max(0), best / 20) / found.scale - 1).max() > 0.02


def test_never_worse_than_rounding_to_nearest():
    for seed in range(5):
        x, w = problem(seed=seed, salient=1.0)
        found = search(x, w)
        nearest = np.square(x @ (w - round_to_nearest(w, QUANTIZER))).mean()
        np.testing.assert_allclose(found.losses[0], nearest, rtol=1e-3)
        assert found.losses.min() <= found.losses[0]
        np.testing.assert_array_equal(awq_scale(magnitude(x), 0.0), 1)


def test_a_salient_channel_is_kept():
    x, w = problem(salient=50.0)
    found = search(x, w)
    assert found.losses.min() < found.losses[0] / 3
    assert int(jnp.argmax(found.scale)) == 5


def test_scaling_alone_changes_nothing():
    x, w = problem()
    s = np.asarray(awq_scale(magnitude(x), 0.7), np.float64)
    assert s.max() / s.min() > 5
    np.testing.assert_allclose((x / s) @ (w * s[:, None]), x.astype(np.float64) @ w, atol=1e-10)


def test_group_ends_are_kept_within_half_a_step():
    """Of the asymmetric quantizer, for groups with weights of both signs."""
    _, w = problem()
    q, blocks = round_to_nearest(w, QUANTIZER).reshape(3, 8, 16), w.reshape(3, 8, 16)
    scale = (blocks.max(1) - blocks.min(1)) / 7
    for end in (np.max, np.min):
        assert (np.abs(end(q, 1) - end(blocks, 1)) <= scale / 2 * (1 + 1e-5)).all()


def test_magnitude_without_padding():
    x, _ = problem()
    valid = np.arange(64) < 40
    np.testing.assert_allclose(magnitude(x, valid), np.abs(x[:40]).mean(0), rtol=1e-6)
    assert not np.allclose(magnitude(x), magnitude(x, valid), rtol=1e-3)


@pytest.mark.parametrize(
    "quantizer",
    [
        QUANTIZER,
        pytest.param(absmax(bits=3), marks=pytest.mark.slow),
        pytest.param(absmax(bits=3, granularity="tensor"), marks=pytest.mark.slow),
    ],
    ids=["group", "channel", "tensor"],
)
def test_clip_is_the_best_of_all(quantizer):
    """Against the errors of every candidate, token by token in float64."""
    x, w = problem(salient=3.0)
    w[3, :8] = 4.0
    importance = np.random.default_rng(1).uniform(0, 2, len(x)).astype(np.float32)
    limits = jax.jit(lambda: search_clip(w, x, quantizer, importance))()
    group = quantizer.group_size or len(w)
    whole = quantizer.granularity == "tensor"
    wb = w.reshape(-1, group, w.shape[1])
    xb = x.astype(np.float64).reshape(len(x), -1, group)
    largest = np.abs(wb).max((1, 2) if whole else 1, keepdims=True)
    candidates, errors = [], []
    for i in range(10):
        limit = np.float32(largest * (1 - i / 20))
        q = np.asarray(round_to_nearest(jnp.clip(wb, -limit, limit).reshape(w.shape), quantizer))
        d = xb.transpose(1, 0, 2) @ (q.reshape(wb.shape) - wb.astype(np.float64))
        error = (importance[:, None] * np.square(d)).sum(1)[:, None]
        errors.append(error.sum(-1, keepdims=True) if whole else error)
        candidates.append(limit)
    best = np.argmin(errors, axis=0)
    expected = np.take_along_axis(np.stack(candidates), best[None], 0)[0]
    assert limits.shape == expected.shape
    np.testing.assert_allclose(limits, expected, rtol=1e-5)
    assert (best > 0).any()
    clipped = clip_weights(jnp.asarray(w, jnp.bfloat16), limits, quantizer)
    assert clipped.dtype == jnp.bfloat16
    assert (np.abs(clipped.astype(np.float32)).reshape(wb.shape) <= limits * 1.01).all()


def test_output_error():
    rng = np.random.default_rng(0)
    y, z = rng.normal(size=(2, 5, 3))
    a = np.array([0, 1, 2, 0, 0.5])
    for error, power in (("squared", 2), ("absolute", 1)):
        expected = (a * (np.abs(y - z) ** power).mean(-1)).sum() / a.sum()
        np.testing.assert_allclose(output_error(y, z, a, error), expected, rtol=1e-6)
    z[3] = np.nan
    assert np.isfinite(output_error(y, z, a))
    with pytest.raises(ValueError, match="error must be one of"):
        output_error(y, z, a, "cubed")


def test_refuses_tables():
    _, w = problem()
    with pytest.raises(ValueError, match="contraction_axis=-2"):
        search_clip(w, w.T, absmax(bits=4, contraction_axis=-1))
