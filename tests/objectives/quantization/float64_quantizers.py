"""Every quantizer as an independent NumPy float64 version of itself, one block at a time."""

import math

import jax
import ml_dtypes
import numpy as np

from objectives.quantization import QUANTIZERS

INPUTS, OUTPUTS, GROUP = 16, 8, 4
GRANULARITIES = ("tensor", "channel", "group")
LEARNED = ("elastic_binary", "ternary", "seq", "lsq")

# (factory, options beyond the layout); the first of each name also runs stacked and sharded.
CASES = [
    ("elastic_binary", {}),
    ("elastic_binary", {"zero_sign": 1}),
    ("ternary", {}),
    ("seq", {}),
    ("lsq", {"bits": 4}),
    ("lsq", {"bits": 3, "initial": "mean"}),
    ("lsq", {"bits": 8}),
    ("absmax", {"bits": 4}),
    ("absmax", {"bits": 2}),
    ("absmax", {"bits": 8, "bound": "half"}),
    ("minmax", {"bits": 4}),
    ("minmax", {"bits": 8}),
    ("dense_shift", {"bits": 3}),
    ("dense_shift", {"bits": 4}),
    ("mxfp4", {}),
    ("mxfp4", {"scale_rounding": "ceil"}),
    ("nvfp4", {}),
    ("nvfp4", {"tensor_scale": False}),
    ("fp8_e4m3", {}),
    ("fp8_e5m2", {}),
]
FIRST = [case for i, case in enumerate(CASES) if case[0] not in [n for n, _ in CASES[:i]]]


def name_of(case):
    return "-".join([case[0], *(str(value) for value in case[1].values())])


def make(case, granularity, **layout):
    name, options = case
    return QUANTIZERS[name](granularity=granularity, group_size=GROUP, **options, **layout)


# The reference: one block of weights, one scale, float64.

CLIP = float(np.float32(0.99))


def reference_learned(name, options, w, alpha):
    """(quantized, mask of the weight's gradient, slope of the scale's) of one block."""
    x = w / max(alpha, 1e-5)
    if name == "elastic_binary":
        sign = np.sign(x) + (options.get("zero_sign", 0) and x == 0)
        return max(alpha, 1e-5) * sign, np.abs(x) <= 1, sign
    if name == "lsq":
        low, high = -(2 ** (options["bits"] - 1)), 2 ** (options["bits"] - 1) - 1
        q = np.minimum(np.maximum(np.round(x), low), high)
        below, above = x < low, x > high
        slope = np.select([below, above], [low, high], np.round(x) - x)
        return max(alpha, 1e-5) * q, ~below & ~above, slope
    stretch, shift, edge = {"seq": (2, 0.5, 0.75), "ternary": (1.5, 0, 1)}[name]
    q = (np.round(np.clip(x, -CLIP, CLIP) * stretch - shift) + shift) / stretch
    below, above = x < -CLIP, x > CLIP
    return max(alpha, 1e-5) * q, ~below & ~above, np.select([below, above], [-edge, edge], q - x)


def reference_initial(name, options, w):
    if name == "elastic_binary":
        return np.abs(w).mean()
    if name != "lsq":
        return np.abs(w).max()
    high = 2 ** (options["bits"] - 1) - 1
    if options.get("initial") == "mean":
        return 2 * np.abs(w).mean() / math.sqrt(high)
    return np.abs(w).max() / high


def nearest_float(x, dtype):
    """By search among all values of the format, ties to the even code, saturating."""
    bits = ml_dtypes.finfo(dtype).bits
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    values = values[np.isfinite(values)]  # ascending with the code
    distance = np.abs(np.abs(x)[..., None] - values)
    closest = distance == distance.min(-1, keepdims=True)
    even = np.arange(values.size) % 2 == 0
    code = np.where((closest & even).any(-1), (closest & even).argmax(-1), closest.argmax(-1))
    return np.copysign(values[code], x)


def reference_data(name, options, w, matrix):
    """Quantized block; `matrix` is all of the matrix that it is in."""
    bits, largest = options.get("bits"), np.abs(w).max()
    if largest == 0 and name not in ("dense_shift",):
        return w
    if name == "absmax":
        high = 2 ** (bits - 1) - 1
        scale = largest / (high + (0.5 if options.get("bound") == "half" else 0))
        return scale * np.clip(np.round(w / scale), -high - 1, high)
    if name == "minmax":
        lowest, highest = min(w.min(), 0), max(w.max(), 0)
        scale = (highest - lowest) / (2**bits - 1)
        zero = -np.round(lowest / scale)
        return scale * (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero)
    if name == "dense_shift":
        shifts = 2.0 ** np.arange(2 ** (bits - 1))
        scale = largest / shifts[-1] if largest else 1.0
        distance = np.abs(np.abs(w)[..., None] / scale - shifts)
        return np.where(w < 0, -1, 1) * scale * shifts[distance.argmin(-1)]
    if name == "mxfp4":
        if options.get("scale_rounding") == "ceil":
            scale = 2.0 ** math.ceil(math.log2(largest / 6))
        else:
            scale = 2.0 ** (math.floor(math.log2(largest)) - 2)
        return scale * nearest_float(w / scale, ml_dtypes.float4_e2m1fn)
    if name == "nvfp4":
        outer = np.abs(matrix).max() / (6 * 448) if options.get("tensor_scale", True) else 1.0
        inner = nearest_float(largest / (6 * outer), ml_dtypes.float8_e4m3fn)
        scale = outer * max(float(inner), 2.0**-9)
        return scale * nearest_float(w / scale, ml_dtypes.float4_e2m1fn)
    dtype = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[name]
    scale = largest / float(ml_dtypes.finfo(dtype).max)
    return scale * nearest_float(w / scale, dtype)


def block_slices(granularity, inputs, outputs):
    """(index of the scale, slice of the matrix) of every block."""
    if granularity == "tensor":
        yield (0, 0), np.s_[:, :]
        return
    size = GROUP if granularity == "group" else inputs
    for g in range(inputs // size):
        for o in range(outputs):
            yield (g, o), np.s_[g * size : (g + 1) * size, o : o + 1]


def reference(case, granularity, weights, scale, cotangent):
    """(quantized, d weights, d scale), matrix by matrix and block by block, in float64."""
    name, options = case
    if weights.ndim > 2:
        layers = [
            reference(case, granularity, w, s, c)
            for w, s, c in zip(weights, scale, cotangent, strict=True)
        ]
        return tuple(np.stack(results) for results in zip(*layers, strict=True))
    w, c = np.asarray(weights, np.float64), np.asarray(cotangent, np.float64)
    quantized, d_weights = np.zeros_like(w), c.copy()
    d_scale = np.zeros(np.shape(scale))
    factor = {"lsq": 2 ** (options.get("bits", 1) - 1) - 1}.get(name, 1)
    for index, block in block_slices(granularity, *w.shape):
        if name in LEARNED:
            quantized[block], mask, slope = reference_learned(
                name, options, w[block], float(scale[index])
            )
            d_weights[block] *= mask
            d_scale[index] = (c[block] * slope).sum() / math.sqrt(w.size * factor)
        else:
            quantized[block] = reference_data(name, options, w[block], w)
    return quantized, d_weights, d_scale


def random_inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(shape) * np.exp(rng.uniform(-3, 1, (*shape[:-2], 1, shape[-1])))
    return weights.astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def tie_inputs(case, shape, granularity, seed=0):
    """Weights on and halfway between levels, and at the edges, of grids with scales 2^k.

    Every division is exact in float32, so a tie is a tie in both versions.
    """
    name, options = case
    rng = np.random.default_rng(seed)
    bits = options.get("bits", 2)
    top = {
        "lsq": 2 ** (bits - 1) - 1,
        "absmax": 2 ** (bits - 1) - 1,
        "minmax": 2**bits - 1,
        "dense_shift": 2.0 ** (2 ** (bits - 1) - 1),
        "mxfp4": 6,
        "nvfp4": 6,
        "fp8_e4m3": 448,
        "fp8_e5m2": 57344,
    }.get(name, 1)
    if options.get("bound") == "half":
        top += 0.5
    weights = np.zeros(shape)
    scale = np.zeros((shape[0] // GROUP if granularity == "group" else 1, shape[1]))
    scale = scale[:, :1] if granularity == "tensor" else scale
    for index, block in block_slices(granularity, *shape):
        unit = 2.0 ** rng.integers(-6, 3)
        values = rng.integers(-8, 9, weights[block].shape) / 8 * top
        if top > 1 and name != "minmax":  # eighths of a level near zero, too
            near = rng.integers(-16, 17, values.shape) / 8
            values = np.where(rng.random(values.shape) < 0.7, near, values)
        elif name == "minmax":
            values = np.abs(np.round(values * 2) / 2)
        values.flat[0], values.flat[1], values.flat[2] = top, 0, 0 if name == "minmax" else -top
        if name == "lsq":
            values.flat[3] = -top - 1.5
        elif name in ("seq", "ternary"):
            values.flat[2:4] = np.float32(0.99), -np.float32(0.99)
        weights[block] = unit * values
        scale[index] = unit
    if name == "nvfp4" and options.get("tensor_scale", True):
        weights.flat[0] = 6 * 448 * 2.0**-6
    cotangent = rng.standard_normal(shape)
    return weights.astype(np.float32), scale.astype(np.float32), cotangent.astype(np.float32)


def value_and_gradients(quantizer):
    """jit of (weights, scale, cotangent) -> quantized, d weights, d scale, codes, decoded codes."""

    def run(weights, scale, cotangent):
        quantized, vjp = jax.vjp(quantizer.quantize, weights, scale)
        grid = quantizer.grid(weights, scale)
        codes = quantizer.encode(weights, grid)
        return quantized, *vjp(cotangent), codes, quantizer.decode(codes, grid)

    return jax.jit(run)


def assert_same(case, granularity, actual, weights, scale, cotangent):
    scale = scale if case[0] in LEARNED else np.zeros(weights.shape[:-2])
    expected = reference(case, granularity, weights, scale, cotangent)
    size = np.abs(np.asarray(weights)).max()
    if case[1].get("bound") == "half":
        # The largest weights are ties by construction, and the last bit of a float32 decides.
        step = np.abs(actual[0] - expected[0])
        largest = np.asarray(weights) <= -127 / 128 * np.abs(actual[0])
        tied = largest & (step > 1e-3 * np.abs(expected[0]))
        assert (step[tied] <= np.abs(weights)[tied] / 127).all()
        expected = (np.where(tied, actual[0], expected[0]), *expected[1:])
    np.testing.assert_allclose(actual[0], expected[0], rtol=2e-6, atol=1e-7 * size)
    np.testing.assert_array_equal(np.asarray(actual[1], np.float64), expected[1])
    if case[0] in LEARNED:
        np.testing.assert_allclose(actual[2], expected[2], rtol=2e-5, atol=2e-6)
    else:
        assert actual[2] == ()
