"""A stack of several widths is its layers one by one, forward and backward, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives.quantization import (
    Mixed,
    absmax,
    lsq,
    minmax,
    mixed,
    mxfp4,
    nvfp4,
    pack,
    pack_layers,
    packed_layers_size,
    paretoq,
    quantizer_of_layer,
    settle,
    unpack_layers,
)

FAMILIES = {
    "paretoq": [paretoq(bits) for bits in (4, 2, 1.58)],
    "absmax": [absmax(bits, granularity="group", group_size=8) for bits in (3, 8, 3)],
    "minmax": [minmax(bits) for bits in (2, 4, 8)],
}


def weights(layers=3, inputs=16, outputs=6, seed=0):
    return jax.random.normal(jax.random.key(seed), (layers, inputs, outputs))


def stacked(function):
    return jax.tree.map(lambda *x: np.stack(x), *(function(i) for i in range(3)))


@pytest.mark.parametrize("family", tiny.mostly_slow(FAMILIES, ("paretoq",)))
def test_a_stack_is_its_layers_one_by_one(family):
    quantizers, w = FAMILIES[family], weights()
    stack = mixed(quantizers)
    assert stack.widths == tuple(q.bits for q in quantizers)
    scale = jax.tree.map(lambda x: 0.8 * x, stack.init(w).scale)
    scale = stack.init(w)._replace(scale=scale)
    of_layer = [jax.tree.map(lambda x, i=i: x[i], scale.scale) for i in range(3)]

    @jax.jit
    def all_of(w, scale):
        grid = stack.grid(w, scale)
        codes = stack.encode(w, grid)
        value = stack.quantize(w, scale)
        gradient = jax.grad(lambda w, s: (stack.quantize(w, s) ** 2).sum(), (0, 1))(w, scale)
        return value, stack.inside(w, scale), grid, codes, stack.decode(codes, grid), gradient

    def layer(i):
        q, w_IO, s = quantizers[i], w[i], of_layer[i]
        grid = q.grid(w_IO, s)
        codes = q.encode(w_IO, grid)
        gradient = jax.grad(lambda w, s: (q.quantize(w, s) ** 2).sum(), (0, 1))(w_IO, s)
        value = q.quantize(w_IO, s)
        return (value, q.inside(w_IO, s), grid, codes, q.decode(codes, grid)), gradient

    *found, (of_w, of_scale) = all_of(w, scale)
    expected, (expected_w, expected_scale) = stacked(layer)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(of_w, expected_w, rtol=1e-5)
    pairs = zip(jax.tree.leaves(of_scale.scale), jax.tree.leaves(expected_scale), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The index is data without a gradient.
    np.testing.assert_array_equal(of_scale.index, np.zeros((3, 1, 1)))
    # Negative control: with one width for all it is another stack.
    other = quantizers[0].quantize(w[1], quantizers[0].init(w[1]))
    assert np.abs(found[0][1] - other).max() > 0.01


def test_widths_change_without_another_compilation_inside_a_scan():
    w = weights()
    choices = [paretoq(bits) for bits in (2, 3, 4, 8)]
    stack = mixed([choices[0]] * 3, choices)
    first = stack.init(w)
    assert first.index.dtype == jnp.float32

    @jax.jit
    def scanned(w, scale):
        return jax.lax.scan(lambda _, x: ((), stack.quantize(*x)), (), (w, scale))[1]

    for layers in ((0, 0, 0), (3, 1, 2)):
        index = jnp.asarray(layers, jnp.float32)[:, None, None]
        found = scanned(w, first._replace(index=index))
        for i, of_layer in enumerate(layers):
            expected = choices[of_layer].quantize(w[i], first.scale[i])
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    assert scanned._cache_size() <= 1  # 0: put out of a full cache of the whole process
    # An average of indices is off by rounding, and means the same.
    nearly = first._replace(index=index * (1 - 1e-6))
    np.testing.assert_array_equal(scanned(w, nearly), found)
    # One branch runs: the program keeps the conditional.
    assert "conditional(" in scanned.lower(w, first).compile().as_text()


def test_settling_reads_the_widths_from_the_scale():
    w, choices = weights(), [absmax(bits) for bits in (2, 4, 8)]
    stack = mixed([choices[1]] * 3, choices)
    scale = stack.init(w)
    assert settle(stack, scale) == (choices[1], ())
    changed = scale._replace(index=jnp.asarray([2.0, 0.0, 1.0])[:, None, None])
    settled, same = settle(stack, changed)
    assert settled.widths == (8, 2, 4)
    assert same is changed
    assert [quantizer_of_layer(settled, i).bits for i in range(3)] == [8, 2, 4]
    assert quantizer_of_layer(choices[0], 5) is choices[0]
    assert quantizer_of_layer(None, 0) is None
    assert settle(None, ()) == (None, ())
    with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
        settle(stack, scale._replace(index=jnp.full((3, 1, 1), 3.0)))


@pytest.mark.parametrize(
    ("quantizers", "message"),
    [
        ([], "at least one layer"),
        ([absmax(4), absmax(4, granularity="group", group_size=8)], "one layout"),
        ([lsq(4), absmax(4)], "scales of other shapes"),
        ([absmax(4), minmax(4)], "scales of other shapes"),
        ([absmax(4)] * 3, "widths of 3 layers"),
        ([mxfp4(), nvfp4()], "one layout"),
    ],
)
def test_what_makes_no_stack_is_refused(quantizers, message):
    with pytest.raises(ValueError, match=message):
        mixed(quantizers).init(weights(layers=2))
    assert isinstance(mixed([lsq(4), lsq(3)]), Mixed)


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 64, 3)])
def test_codes_of_layers_are_packed_at_their_own_widths(shape):
    bits, rng = (1.58, 3, 8), np.random.default_rng(0)
    levels = (3, 8, 256)
    codes = np.stack([rng.integers(0, n, shape[1:]) for n in levels]).astype(np.uint8)
    packed = pack_layers(codes, bits)
    count = shape[1] * shape[2]
    size = -(-count // 5) + -(-3 * count // 8) + count
    assert packed.size == packed_layers_size(count, bits) == size
    np.testing.assert_array_equal(unpack_layers(packed, bits, shape), codes)
    np.testing.assert_array_equal(packed[: -(-count // 5)], pack(codes[0], 1.58))
    with pytest.raises(ValueError, match="bytes; got"):
        unpack_layers(packed[:-1], bits, shape)
    with pytest.raises(ValueError, match="2 widths for codes"):
        unpack_layers(packed, bits[:2], shape)
    with pytest.raises(ValueError, match="must be in"):
        pack_layers(codes, (1.58, 2, 8))
