"""What is told of a quantized model: against loops in float64, and against the packed file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open

from lm.compression import report
from lm.compression.after_training import round_to_nearest_model
from lm.compression.packed import write_packed
from lm.compression.phases import default_rules
from lm.compression.report import describe
from objectives.quantization import QUANTIZERS

UP, TABLE = "layers/mlp/up", "embedding/table"


def parameters(dtype=jnp.float32):
    """Three layers of 8 inputs and 5 outputs, so that no layer's codes of 3 bits fill bytes."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])), dtype)

    up = normal(3, 8, 5).at[1, 2, 3].set(0)
    return {
        "embedding": {"table": normal(7, 8)},
        "head": {"kernel": normal(8, 7)},
        "layers": {
            "mlp": {"up": up, "down": normal(3, 4, 8)},
            "mlp_norm": {"scale": jnp.ones((3, 8))},
        },
    }


def quantized(name="absmax", bits=3, params=None, **layout):
    params = parameters() if params is None else params
    result = round_to_nearest_model(params, default_rules(bits, QUANTIZERS[name], **layout))
    return params, result, describe(params, result)


def matrix(description, path):
    (found,) = [m for m in description.matrices if m.path == path]
    return found


def leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree, np.float64)


def reference(weights, rounded):
    """Error, outlier and rms of a matrix, weight by weight."""
    squares = errors = largest = 0.0
    for w, q in zip(weights.reshape(-1).tolist(), rounded.reshape(-1).tolist(), strict=True):
        squares += w * w
        errors += (w - q) ** 2
        largest = max(largest, abs(w))
    rms = (squares / weights.size) ** 0.5
    return errors / squares, largest / rms, rms


def absmax(weights, bits):
    """Rounding to nearest, a column at a time."""
    found, high = np.zeros_like(weights), 2 ** (bits - 1) - 1
    for o in range(weights.shape[1]):
        scale = np.abs(weights[:, o]).max() / high
        found[:, o] = scale * np.rint(weights[:, o] / scale)
    return found


def test_numbers_are_those_of_a_loop_of_every_layer():
    params, _, description = quantized()
    layers, weights = matrix(description, UP).layers, leaf(params, UP)
    assert [layer.index for layer in layers] == [0, 1, 2]
    errors = []
    for layer, w in zip(layers, weights, strict=True):
        rounded = absmax(w, 3)
        error, outlier, rms = reference(w, rounded)
        np.testing.assert_allclose(
            [layer.error, layer.outlier, layer.rms], [error, outlier, rms], 1e-5
        )
        errors.append(error)
        steps = np.rint(rounded / (np.abs(w).max(0) / 3)).astype(int)
        counts = [(steps == step).sum() for step in range(-4, 4)]
        assert layer.code_counts.tolist() == counts
        # The lowest of the 8 codes is never used: 3 steps to either side are the outermost.
        assert layer.outermost == (counts[1] + counts[7]) / w.size
        for step, mean in zip(range(-4, 4), layer.code_means, strict=True):
            of_step = rounded[steps == step]
            expected = of_step.mean() if of_step.size else np.nan
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-9)
    assert len({f"{error:.6f}" for error in errors}) == 3
    (table,) = matrix(description, TABLE).layers
    assert table.index is None
    assert table.bits == 4
    rounded = absmax(leaf(params, TABLE).T, 4).T
    np.testing.assert_allclose(table.error, reference(leaf(params, TABLE), rounded)[0], rtol=1e-5)


def test_the_codes_of_another_layer_are_another_error():
    params, result, description = quantized()
    coded = result.coded[UP]
    other = coded._replace(codes=coded.codes[::-1])
    wrong = describe(params, result._replace(coded=result.coded | {UP: other}))
    right = matrix(description, UP).layers[0].error
    assert matrix(wrong, UP).layers[0].error > 3 * right
    assert matrix(wrong, TABLE).layers[0].error == matrix(description, TABLE).layers[0].error


@pytest.mark.parametrize(
    ("name", "bits", "layout"),
    tiny.rows_mostly_slow(
        [
            ("absmax", 3, {}),
            ("ternary", 1.58, {}),
            ("elastic_binary", 1, {}),
            ("minmax", 3, {"granularity": "group", "group_size": 4}),
            ("mxfp4", 4, {"granularity": "group", "group_size": 4}),
            ("absmax", 5, {"granularity": "tensor"}),
        ],
        (0, 1, 3),
    ),
)
def test_bytes_are_those_of_the_packed_file(name, bits, layout, tmp_path):
    params, quantizer = parameters(), QUANTIZERS[name](bits=bits, **layout)
    result = round_to_nearest_model(
        params, lambda path: quantizer if path.startswith("layers/mlp/") else None
    )
    description = describe(params, result)
    path = tmp_path / "x.safetensors"
    write_packed(path, result.leaves(), config={}, vocab_size=7, tokenizer="", step=0)
    stored = {}
    with safe_open(path, framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            *_, kind = key.rpartition(".") if "." in key else ("kept",)
            stored[kind] = stored.get(kind, 0) + file.get_tensor(key).nbytes
    total = description.total
    assert total.codes == stored["codes"]
    assert total.scales == stored["scale"] + stored.get("zero", 0)
    assert total.exact_zeros == stored.get("exact_zeros", 0)
    assert total.kept == stored["kept"]
    assert total.after == sum(stored.values()) == sum(s.after for s in description.groups.values())
    assert total.parameters == sum(x.size for x in map(np.asarray, _leaves(params)))
    if name == "elastic_binary":
        assert total.exact_zeros == 8
        assert [layer.size.exact_zeros for layer in matrix(description, UP).layers] == [0, 8, 0]


def _leaves(tree):
    return [x for v in tree.values() for x in _leaves(v)] if isinstance(tree, dict) else [tree]


def test_groups_are_the_kinds_of_parameters():
    _, _, description = quantized("absmax", 3)
    groups = description.groups
    assert {kind: size.parameters for kind, size in groups.items()} == {
        "matrix": 3 * 40 + 3 * 32,
        "embedding": 56,
        "head": 56,
        "other": 24,
    }
    assert groups["other"].kept == groups["other"].before == 4 * 24
    assert groups["embedding"].codes == 28
    assert groups["embedding"].scales == 4 * 7
    assert groups["embedding"].bits_per_weight == 4 + 32 / 8


def test_histograms_hold_all_weights_and_scales():
    params = parameters()
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[2, 0, 0].set(1e3)
    _, result, description = quantized(params=params)
    layers = matrix(description, UP).layers
    assert [layer.beyond for layer in layers] == [0, 0, 1]
    for layer, w in zip(layers, leaf(params, UP), strict=True):
        counts = np.zeros(64, int)
        for value in w.reshape(-1):
            if abs(value) <= 6 * layer.rms:
                counts[min(63, int((value / layer.rms + 6) / 12 * 64))] += 1
        np.testing.assert_array_equal(layer.weights.counts, counts)
        np.testing.assert_allclose(layer.weights.edges[[0, -1]], [-6 * layer.rms, 6 * layer.rms])
    scales = np.log2(np.asarray(result.coded[UP].grid.scale, np.float64))
    for layer, of_layer in zip(layers, scales, strict=True):
        edges = layer.scales.edges
        assert (edges[0], edges[-1]) == (np.floor(scales.min()), np.ceil(scales.max()))
        expected, _ = np.histogram(of_layer, edges)
        np.testing.assert_array_equal(layer.scales.counts, expected)


def test_zeros_and_weights_on_the_grid_have_no_error():
    params = parameters()
    up = jnp.zeros((3, 8, 5)).at[1].set(jnp.array([-3, -1, 0, 1, 2, 3, 3, 1.0])[:, None])
    params["layers"]["mlp"]["up"] = up
    _, _, description = quantized(params=params)
    zeros, exact, _ = matrix(description, UP).layers
    assert (zeros.error, zeros.outlier, zeros.outermost) == (0, 0, 1)  # one code, both ends
    assert zeros.weights.counts.sum() == 40
    assert exact.error == 0
    assert exact.outermost == 3 / 8
    np.testing.assert_array_equal(exact.code_means[1:], [-3, np.nan, -1, 0, 1, 2, 3])


@pytest.mark.parametrize("name", tiny.mostly_slow(["fp8_e4m3", "fp8_e5m2"], ("fp8_e4m3",)))
def test_outermost_codes_of_floats_are_those_of_the_largest_values(name):
    """Their codes are no order of their values, and some stand for no number."""
    params = parameters()
    w = jnp.tile(jnp.array([-1.0, 1.0, 0.5, 0, 0.25, -0.25, 1.0, 0.1])[:, None], (3, 1, 5))
    params["layers"]["mlp"]["up"] = w
    _, _, description = quantized(name, 8, params)
    assert [layer.outermost for layer in matrix(description, UP).layers] == [3 / 8] * 3


def test_blocks_and_bfloat16_and_arrays_of_the_host_change_nothing(monkeypatch):
    params = parameters(jnp.bfloat16)
    _, result, whole = quantized(params=params)
    coded = {
        path: one._replace(
            codes=np.asarray(one.codes), grid=one.grid._replace(scale=np.asarray(one.grid.scale))
        )
        for path, one in result.coded.items()
    }
    monkeypatch.setattr(report, "_BLOCK", 7)
    cut = describe(params, result._replace(coded=coded))
    assert cut.total == whole.total
    assert cut.total.before == 2 * (cut.total.parameters - 24) + 4 * 24
    for one, other in zip(cut.matrices, whole.matrices, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            np.testing.assert_allclose([a.error, a.outlier], [b.error, b.outlier], rtol=1e-12)
            np.testing.assert_array_equal(a.code_counts, b.code_counts)
            np.testing.assert_array_equal(a.weights.counts, b.weights.counts)
            np.testing.assert_allclose(a.code_means, b.code_means, rtol=1e-12)


def test_weights_that_several_devices_share_are_described_as_a_whole():
    params, result, whole = quantized()
    mesh = jax.make_mesh((2,), ("model",))
    shared = jax.NamedSharding(mesh, jax.P(None, "model"))
    params["layers"]["mlp"]["up"] = jax.device_put(params["layers"]["mlp"]["up"], shared)
    with jax.set_mesh(mesh):
        found = describe(params, result)
    errors = [[layer.error for layer in matrix(d, UP).layers] for d in (found, whole)]
    assert errors[0] == errors[1]
    assert found.total == whole.total
