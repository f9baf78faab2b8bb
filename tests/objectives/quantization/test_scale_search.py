"""Searched scales against a loop in float64, and what they must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import quantization
from objectives.quantization import searched

GROUP = {"granularity": "group", "group_size": 8}


def heavy(shape=(16, 5), seed=0):
    """Weights with a few large ones, so that clipping pays."""
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def by_hand(w, bits, group):
    """Symmetric integers with the best of 80 scales of each group, in float64."""
    w, high = np.asarray(w, np.float64), 2 ** (bits - 1) - 1
    out = np.zeros_like(w)
    for o in range(w.shape[1]):
        for start in range(0, len(w), group):
            block = w[start : start + group, o]
            best = np.inf
            for i in range(80):
                scale = (1 - i / 100) * np.abs(block).max() / high
                rounded = scale * np.clip(np.round(block / scale), -high - 1, high)
                error = (np.abs(rounded - block) ** 2.4).sum()
                if error < best:
                    best, out[start : start + group, o] = error, rounded
    return out


@pytest.mark.parametrize("bits", [2, 4])
def test_is_the_best_of_all_shrinkings(bits):
    w = heavy()
    quantizer = quantization.absmax(bits=bits, **GROUP)
    found = searched(quantizer).quantize(jnp.asarray(w), ())
    np.testing.assert_allclose(found, by_hand(w, bits, 8), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(quantizer.quantize(jnp.asarray(w), ())) - found).max() > 0.1


@pytest.mark.parametrize(
    "quantizer",
    [
        quantization.minmax(bits=3, **GROUP),
        pytest.param(quantization.lsq(bits=3), marks=pytest.mark.slow),
        pytest.param(quantization.seq(**GROUP), marks=pytest.mark.slow),
        pytest.param(quantization.ternary(granularity="tensor"), marks=pytest.mark.slow),
        quantization.absmax(bits=3, contraction_axis=-1),
    ],
    ids=lambda q: f"{q.name} {q.granularity}",
)
def test_no_block_is_worse_than_without_a_search(quantizer):
    w = jnp.asarray(heavy((3, 16, 8)))

    def errors(one):
        rounded = one.quantize(w, one.init(w))
        codes = one.encode(w, one.grid(w, one.init(w)))
        np.testing.assert_array_equal(rounded, one.decode(codes, one.grid(w, one.init(w))))
        size = (16, 8) if one.granularity == "tensor" else (16, 1)
        if one.granularity == "group":
            size = (8, 1)
        if one.contraction_axis == -1:
            size = (1, 8)
        error = np.abs(np.asarray(rounded - w, np.float64)) ** 2.4
        return error.reshape(3, 16 // size[0], size[0], 8 // size[1], size[1]).sum((2, 4))

    found, plain = errors(searched(quantizer)), errors(quantizer)
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < plain.sum()


def test_one_step_is_the_quantizer_and_gradients_pass():
    w = jnp.asarray(heavy())
    plain = quantization.absmax(bits=4)
    np.testing.assert_array_equal(
        searched(plain, steps=1).quantize(w, ()), plain.quantize(w, plain.init(w))
    )
    gradient = jax.grad(lambda w: (searched(plain).quantize(w, ()) * 3).sum())(w)
    np.testing.assert_array_equal(gradient, jnp.full(w.shape, 3.0))
    clipped = ~np.asarray(searched(quantization.absmax(bits=2)).inside(w, ()))
    assert 0 < clipped.sum() < w.size / 2


@pytest.mark.parametrize(
    ("quantizer", "steps"), [(quantization.mxfp4(), 80), (quantization.absmax(bits=4), 101)]
)
def test_refuses(quantizer, steps):
    with pytest.raises(ValueError, match=r"no search|from 1 to 100"):
        searched(quantizer, steps=steps)
