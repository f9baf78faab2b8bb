"""Every quantizer is an independent NumPy float64 version of itself, in values and gradients."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
import tiny
from float64_quantizers import (
    CASES,
    FIRST,
    GRANULARITIES,
    INPUTS,
    LEARNED,
    OUTPUTS,
    assert_same,
    block_slices,
    make,
    name_of,
    random_inputs,
    reference_initial,
    tie_inputs,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from objectives import quantization
from objectives.quantization import QUANTIZERS
from objectives.quantization.dense_shift import init_latents, sign_scale

# The other options of a quantizer have nothing to do with blocks.
PLACES = [(case, g) for case in CASES for g in GRANULARITIES if case in FIRST or g == "channel"]


@pytest.mark.parametrize(
    ("case", "granularity"),
    tiny.rows_mostly_slow(PLACES, range(0, len(PLACES), 3)),
    ids=[f"{name_of(case)}-{g}" for case, g in PLACES],
)
def test_equals_float64(case, granularity):
    quantizer = make(case, granularity)
    run = value_and_gradients(quantizer)
    weights, cotangent = random_inputs((INPUTS, OUTPUTS))
    scale = quantizer.init(weights)
    if case[0] in LEARNED:
        expected = np.zeros(scale.shape)
        for index, block in block_slices(granularity, INPUTS, OUTPUTS):
            expected[index] = reference_initial(*case, weights[block].astype(np.float64))
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        scale = 0.7 * scale  # so that some weights are outside of the clip range
    assert_same(case, granularity, run(weights, scale, cotangent), weights, scale, cotangent)

    for seed in range(3):
        weights, scale, cotangent = tie_inputs(case, (INPUTS, OUTPUTS), granularity, seed)
        given_scale = scale if case[0] in LEARNED else ()
        actual = run(weights, given_scale, cotangent)
        assert_same(case, granularity, actual, weights, scale, cotangent)

    # Integer codes say the same.
    codes, decoded = actual[3:]
    assert codes.dtype == jnp.uint8
    assert int(codes.max()) < quantizer.levels
    if quantizer.name != "elastic_binary" or case[1]:  # one bit has no code for sign(0) = 0
        np.testing.assert_array_equal(decoded, actual[0])

    zeros = np.zeros_like(weights)
    quantized = run(zeros, jax.tree.map(jnp.zeros_like, given_scale), zeros)[0]
    assert np.isfinite(quantized).all()


@pytest.mark.parametrize("granularity", tiny.mostly_slow(GRANULARITIES, ("group",)))
@pytest.mark.parametrize("case", tiny.mostly_slow(FIRST, FIRST[::2]), ids=name_of)
def test_stacked_and_sharded(case, granularity):
    """Layers are separate matrices, and a mesh changes nothing: [L, I, O] over 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    quantizer = make(case, granularity)
    weights, cotangent = random_inputs((3, INPUTS, OUTPUTS))
    scale = jax.tree.map(lambda a: 0.7 * a, quantizer.init(weights))
    place = NamedSharding(mesh, P(None, "data", "tensor"))
    sharded = [jax.device_put(a, place) for a in (weights, cotangent)]
    actual = value_and_gradients(quantizer)(sharded[0], scale, sharded[1])
    assert_same(case, granularity, actual, weights, scale, cotangent)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.int32, (8, 3), elements=st.integers(-80, 80)),
    st.lists(st.integers(-8, 8), min_size=3, max_size=3),
)
@pytest.mark.parametrize("case", [c for c in FIRST if c[0] in LEARNED], ids=name_of)
def test_any_learned(case, eighths, exponents):
    """Dyadic weights and scales: every eighth of a step, so ties and edges are common."""
    scale = np.float32(2.0) ** np.array(exponents, np.float32)[None]
    weights = (scale * eighths / 8).astype(np.float32)
    cotangent = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    actual = HYPOTHESIS_RUNS[case[0]](weights, scale, cotangent)
    assert_same(case, "channel", actual, weights, scale, cotangent)


HYPOTHESIS_RUNS = {
    case[0]: value_and_gradients(make(case, "channel")) for case in FIRST if case[0] in LEARNED
}


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        (ml_dtypes.float4_e2m1fn, "E2M1"),
        (ml_dtypes.float8_e4m3fn, "E4M3"),
        (ml_dtypes.float8_e5m2, "E5M2"),
    ],
)
def test_floats_are_those_of_ml_dtypes(dtype, element):
    from objectives.quantization import block_float

    element = getattr(block_float, element)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    nonzero = values != 0  # -0 and 0 are one code
    np.testing.assert_array_equal(jax.jit(element.encode)(values)[nonzero], codes[nonzero])
    np.testing.assert_array_equal(jax.jit(element.decode)(codes), values)
    positive = np.sort(values[values >= 0])
    x = np.concatenate([positive, (positive[1:] + positive[:-1]) / 2, [element.largest * 1e3]])
    x = np.concatenate([x, np.nextafter(x, np.float32(0), dtype=np.float32), -x])
    x = np.concatenate([x, np.random.default_rng(0).uniform(-8, 8, 500)]).astype(np.float32)
    expected = np.clip(x, -element.largest, element.largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(element.round)(x), expected)


def test_sheet_values():
    w = jnp.array([-1, -0.6, -0.5, -0.4, -0.01, 0, 0.01, 0.4, 0.5, 0.6, 1])[:, None]
    one = jnp.ones((1, 1))
    expected = [-0.75] * 3 + [-0.25] * 2 + [0.25] * 4 + [0.75] * 2
    np.testing.assert_array_equal(quantization.seq().quantize(w, one)[:, 0], expected)
    expected = np.array([-2.0] * 4 + [0] * 3 + [2.0] * 4) / 3
    np.testing.assert_allclose(quantization.ternary().quantize(w, one)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "alpha", "error"),
    [("elastic_binary", None, 1 - 2 / math.pi), ("seq", 1.98, 0.1185), ("ternary", 1.8, 0.190)],
)
def test_error_on_normal_weights(name, alpha, error):
    w = np.random.default_rng(0).standard_normal((500, 400)).astype(np.float32)
    quantizer = QUANTIZERS[name](granularity="tensor")
    scale = quantizer.init(w) if alpha is None else jnp.full((1, 1), alpha)
    assert float(jnp.square(w - quantizer.quantize(w, scale)).mean()) == pytest.approx(error, 0.01)


def test_lsq_gradients_are_those_of_its_autodiff_recipe():
    weights, cotangent = random_inputs((INPUTS, OUTPUTS))
    quantizer = quantization.lsq(bits=3)
    scale = 0.5 * quantizer.init(weights)
    g = 1 / math.sqrt(INPUTS * OUTPUTS * 3)

    def recipe(w, s):
        s = jax.lax.stop_gradient(s * (1 - g)) + s * g
        x = jnp.clip(w / s, -4, 3)
        return s * (x + jax.lax.stop_gradient(jnp.rint(x) - x))

    expected, actual = jax.jit(
        lambda w, s: [jax.vjp(f, w, s)[1](cotangent) for f in (recipe, quantizer.quantize)]
    )(weights, scale)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", tiny.mostly_slow(FIRST, FIRST[::3]), ids=name_of)
def test_scale_equivariance_and_idempotence(case):
    quantizer = make(case, "channel")
    weights, _ = random_inputs((INPUTS, OUTPUTS))
    scale = quantizer.init(weights)
    once = quantizer.quantize(weights, scale)
    larger = quantizer.quantize(4 * weights, jax.tree.map(lambda a: 4 * a, scale))
    np.testing.assert_array_equal(larger, 4 * once)
    tolerance = 0.07 if case[0] == "nvfp4" else 1e-6  # its scale of the scales is rounded itself
    again = quantizer.quantize(once, scale)
    np.testing.assert_allclose(again, once, rtol=tolerance, atol=1e-6)
    assert np.abs(once - weights).max() > 1e-3


@pytest.mark.parametrize(
    ("case", "granularity"),
    [(CASES[3], "tensor"), (CASES[3], "group"), (CASES[10], "channel"), (CASES[16], "group")],
)
def test_contraction_axis(case, granularity):
    """A table [O, I] with contraction_axis=-1 is the matrix [I, O], turned; codes as well."""
    weights, cotangent = random_inputs((INPUTS, OUTPUTS))
    columns, rows = make(case, granularity), make(case, granularity, contraction_axis=-1)
    results = []
    for quantizer, turn in ((columns, np.asarray), (rows, np.transpose)):

        def everything(w, c, quantizer=quantizer):
            scale = jax.tree.map(lambda alpha: 0.5 * alpha, quantizer.init(w))
            quantized, vjp = jax.vjp(quantizer.quantize, w, scale)
            grid = quantizer.grid(w, scale)
            codes = quantizer.encode(w, grid)
            inside = quantizer.inside(w, scale)
            return jax.tree.leaves(
                [quantized, vjp(c), codes, quantizer.decode(codes, grid), inside]
            )

        results.append([turn(a) for a in jax.jit(everything)(turn(weights), turn(cotangent))])
    for ours, turned in zip(*results, strict=True):
        np.testing.assert_allclose(ours, turned, rtol=1e-6)


def test_activations_per_token():
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    scale = quantization.absmax(bits=4, contraction_axis=-1).grid(x, ()).scale
    np.testing.assert_allclose(scale, np.abs(x).max(-1, keepdims=True) / 7, rtol=1e-6)


def test_bfloat16_stays():
    weights, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in random_inputs((INPUTS, OUTPUTS)))
    quantizer = quantization.lsq(bits=4)
    scale = quantizer.init(weights)
    quantized, vjp = jax.vjp(quantizer.quantize, weights, scale)
    d_weights, d_scale = vjp(cotangent)
    assert quantized.dtype == d_weights.dtype == jnp.bfloat16
    assert scale.dtype == d_scale.dtype == jnp.float32


def test_a_clamped_scale_can_grow():
    weights = jnp.full((4, 1), 0.5)
    quantizer = quantization.lsq(bits=4)
    dead = jnp.full((1, 1), -1.0)
    np.testing.assert_allclose(quantizer.quantize(weights, dead), 7e-5, rtol=1e-6)
    assert float(jax.grad(lambda s: quantizer.quantize(weights, s).sum())(dead)[0, 0]) > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_absmax_is_qwix(bits):
    """qwix takes the outer edge of the top level for the largest weight: bound="half"."""
    weights, _ = random_inputs((32, OUTPUTS))
    qtype = {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")

    groups = {"granularity": "group", "group_size": 8}

    def both(weights):
        def theirs(tiles):
            q = qwix.quantize(weights, qtype, channelwise_axes=[1], tiled_axes=tiles)
            return qwix.dequantize(q)

        ours = [
            quantization.absmax(bits, bound=bound, **layout).quantize(weights, ())
            for layout, bound in [({}, "half"), (groups, "half"), ({}, "level")]
        ]
        return ours, (theirs({}), theirs({0: 8}))

    (channel, group, level), theirs = jax.jit(both)(weights)
    np.testing.assert_array_equal(channel, theirs[0])
    np.testing.assert_array_equal(group, theirs[1])
    # Negative control: the two bounds are different grids.
    assert np.abs(level - theirs[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("qtype", "group", "ours", "other"),
    [
        ("mxfp4", 32, {"scale_rounding": "ceil"}, {"scale_rounding": "floor"}),
        ("nvfp4", 16, {"tensor_scale": False}, {"tensor_scale": True}),
    ],
)
def test_block_floats_are_qwix(qtype, group, ours, other):
    weights, _ = random_inputs((64, OUTPUTS))

    def both(weights):
        q = qwix.quantize(weights, qtype, channelwise_axes=[1], tiled_axes={0: group})
        mine = [QUANTIZERS[qtype](**o).quantize(weights, ()) for o in (ours, other)]
        return *mine, qwix.dequantize(q).astype(jnp.float32)

    same, different, theirs = jax.jit(both)(weights)
    # Where a weight is halfway between two levels, the last bit of its division decides.
    assert np.mean(~np.isclose(same, theirs, rtol=1e-6)) < 0.005
    assert np.mean(~np.isclose(different, theirs, rtol=1e-6)) > 0.05


def test_dense_shift_has_no_zero():
    for bits, shifts in ((2, 1), (3, 3), (4, 7)):
        weights = np.linspace(-1, 1, 401, dtype=np.float32)[:, None] * 2.0**shifts
        values = np.unique(quantization.dense_shift(bits).quantize(weights, ()))
        powers = 2.0 ** np.arange(shifts + 1)
        np.testing.assert_array_equal(values, np.concatenate([-powers[::-1], powers]))


def test_sign_scale():
    patterns = np.array(np.meshgrid([1], *[[-1, 1]] * 3)).reshape(4, -1).astype(np.float32)
    weights_of = jax.jit(sign_scale)
    shifts, counts = np.unique(np.log2(weights_of(patterns)), return_counts=True)
    np.testing.assert_array_equal(shifts, [0, 1, 2, 3])
    np.testing.assert_array_equal(counts / 8, [1 / 2, 1 / 4, 1 / 8, 1 / 8])
    assert weights_of(jnp.zeros((4, 1)))[0] == 1  # H(0) = 0, sgn(0) = 1

    latents = init_latents(jax.random.key(0), (250_000,), bits=3)
    weights = np.asarray(weights_of(latents), np.float64)
    assert np.abs(weights).mean() == pytest.approx(2.5, rel=0.01)
    assert np.square(weights).mean() == pytest.approx(11.5, rel=0.01)
    assert np.asarray(latents).std() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sign_scale_gradient_is_that_of_the_surrogate(bits):
    def surrogate(latents):
        def through(hard, soft):  # the identity in place of the derivative
            return soft + jax.lax.stop_gradient(hard - soft)

        shift = 0.0
        for latent in latents[1:]:
            shift = (shift + 1) * through((latent > 0).astype(jnp.float32), latent)
        sign = through(jnp.where(latents[0] >= 0, 1.0, -1.0), latents[0])
        return sign * jnp.sqrt(shift + 1)

    latents = jax.random.normal(jax.random.key(bits), (2 ** (bits - 1), 50))
    cotangent = jax.random.normal(jax.random.key(9), (50,))
    expected, actual = jax.jit(
        lambda x: [jax.vjp(f, x)[1](cotangent)[0] for f in (surrogate, sign_scale)]
    )(latents)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_paretoq_chooses_by_width():
    names = [getattr(quantization.paretoq(bits), "name", None) for bits in (1, 1.58, 2, 3, 8, 16)]
    assert names == ["elastic_binary", "ternary", "seq", "lsq", "lsq", None]


@pytest.mark.parametrize(
    ("make_it", "reason"),
    [
        (lambda: quantization.lsq(bits=2), "lsq has 3, 4, 5, 6, 7, 8 bits; got bits=2"),
        (lambda: quantization.seq(bits=3), "seq has 2 bits"),
        (lambda: quantization.elastic_binary(bits=2), "elastic_binary has 1 bits"),
        (lambda: quantization.ternary(bits=2), "ternary has 1.58 bits"),
        (lambda: quantization.absmax(bits=1), "absmax has 2"),
        (lambda: quantization.minmax(bits=9), "minmax has 2"),
        (lambda: quantization.dense_shift(bits=1), "dense_shift has 2, 3, 4 bits"),
        (lambda: quantization.mxfp4(bits=8), "mxfp4 has 4 bits"),
        (lambda: quantization.fp8_e4m3(bits=4), "fp8_e4m3 has 8 bits"),
        (lambda: quantization.paretoq(12), "16 and above; got 12"),
        (lambda: quantization.lsq(granularity="row"), "granularity must be one of"),
        (lambda: quantization.lsq(granularity="group"), "group_size must be a positive integer"),
        (lambda: quantization.lsq(contraction_axis=0), "contraction_axis must be"),
        (lambda: quantization.lsq(initial="zero"), "initial must be"),
        (lambda: quantization.absmax(bound="edge"), "bound must be"),
        (lambda: quantization.mxfp4(scale_rounding="up"), "scale_rounding must be"),
        (lambda: quantization.elastic_binary(zero_sign=2), "zero_sign must be"),
        (lambda: quantization.seq().init(jnp.ones(3)), "weights must be"),
        (
            lambda: quantization.mxfp4().init(jnp.ones((48, 2))),
            r"group_size=32 does not divide the 48 inputs of a matrix \(48, 2\)",
        ),
    ],
)
def test_bad_arguments(make_it, reason):
    with pytest.raises(ValueError, match=reason):
        make_it()


def test_minmax_rounds_weights_halfway_between_levels_as_exact_division_does():
    """Weights m + d q of a file in Q4_1 with m = -7.5 d are all halfway between two levels."""
    random = np.random.default_rng(0)
    step_GO = random.uniform(0.01, 0.1, (40, 8)).astype(np.float16).astype(np.float32)
    codes_GKO = np.stack([random.permutation(32) % 16 for _ in range(320)]).reshape(40, 8, 32)
    w_GKO = step_GO[:, None] * (codes_GKO.swapaxes(1, 2).astype(np.float32) - np.float32(7.5))
    low_GO, high_GO = w_GKO.min(1, keepdims=True), w_GKO.max(1, keepdims=True)
    scale_GO = (high_GO - low_GO) / np.float32(15)
    zero_GO = -np.rint(low_GO / scale_GO)
    expected_GKO = scale_GO * (np.clip(np.rint(w_GKO / scale_GO) + zero_GO, 0, 15) - zero_GO)
    quantizer = QUANTIZERS["minmax"](bits=4, granularity="group", group_size=32)
    rounded = jax.jit(lambda w: quantizer.quantize(w, ()))(w_GKO.reshape(-1, 8))
    np.testing.assert_array_equal(rounded, expected_GKO.reshape(-1, 8))
