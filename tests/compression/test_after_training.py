"""GPTQ of a whole model: what it computes, and that it is worth its while on a trained one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm.compression import after_training
from lm.compression.after_training import (
    attention_received,
    gptq_model,
    round_to_nearest_model,
)
from lm.compression.integer_grids import integer_grid
from lm.compression.packed import read_packed, write_packed
from lm.compression.phases import default_rules
from lm.compression.widths import of_width, with_widths
from lm.errors import InputError
from objectives.cross_entropy import token_statistics
from objectives.quantization import absmax, calibration_hessian, gptq, init_scales, quantize_tree
from objectives.quantization.gptq import rsq_importance

MATRICES = ("attention/query", "attention/key", "attention/value", "attention/output")
MATRICES += ("mlp/up", "mlp/down")
QUERY = "layers/attention/query"


def text(seed, rows=16, length=32):
    """Rows that count upwards by 1 to 3 from a random start, some of them in two segments."""
    batch = tiny.batch(rows, length + 1, seed, uneven=False)
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 4, (rows, 1))
    tokens = (rng.integers(0, tiny.VOCAB, (rows, 1)) + steps * np.arange(length + 1)) % tiny.VOCAB
    batch = {name: x[:, :-1] for name, x in batch.items()}
    return batch | {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
    }


@functools.cache
def trained(**overrides):
    """(model, parameters, loss function) after a few hundred steps on `text`."""
    model = tiny.model(**overrides)
    optimizer = optax.adamw(5e-3)

    def loss(params, batch):
        hidden = tiny.hidden(model, params, batch)
        return token_statistics(hidden, model.head(params), batch["targets"]).nll.mean()

    @jax.jit
    def train(params, batches):
        def step(carry, batch):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    batches = jax.tree.map(lambda *x: jnp.stack(x), *(text(seed) for seed in range(200)))
    return model, train(tiny.params(model), batches), jax.jit(loss)


CALIBRATION = [text(seed) for seed in range(1000, 1004)]


@functools.cache
def quantized(bits):
    model, params, _ = trained()
    return gptq_model(model, params, CALIBRATION, default_rules(bits, absmax))


def inputs_of(model, params, batches, layers):
    """Path -> inputs [N, I] in float64 of every matrix of layer `layers`, under `params`."""
    found = {}

    @jax.jit
    def run(params, batch):
        seen, x = {}, model.embed(params, batch["tokens"], batch["positions"])
        where = batch["positions"], batch["segment_ids"]

        def product(path, inputs, weights, scale):
            seen[path] = inputs
            return inputs @ weights

        for index in range(layers + 1):
            layer = jax.tree.map(lambda a, i=index: a[i], params["layers"])
            x = model.block(layer, x, *where, product)
        return seen

    for batch in batches:
        for path, x in run(params, batch).items():
            found.setdefault(path, []).append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
    return {path: np.concatenate(x) for path, x in found.items()}


def reference(weights, x, bits):
    """The paper's loop in float64, a scale per output channel."""
    w = np.asarray(weights, np.float64).copy()
    high = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(0) / high
    hessian = 2 * x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(w))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    q = np.zeros_like(w)
    for i in range(len(w)):
        q[i] = scale * np.clip(np.round(w[i] / scale), -high - 1, high)
        w[i:] -= np.outer(upper[i, i:], (w[i] - q[i]) / upper[i, i])
    return q


@pytest.mark.slow
def test_equals_float64_with_the_inputs_under_the_layers_before():
    """The last layer's inputs are those behind a quantized first layer, and only behind that."""
    model, params, _ = trained()
    result = quantized(3)
    mixed = result.params | {
        "layers": jax.tree.map(
            lambda q, w: q.at[1].set(w[1]), result.params["layers"], params["layers"]
        )
    }
    behind = inputs_of(model, mixed, CALIBRATION, 1)
    full = inputs_of(model, params, CALIBRATION, 1)
    for path in ("attention/query", "mlp/down"):
        module, name = path.split("/")
        weights = params["layers"][module][name][1]
        got = np.asarray(result.params["layers"][module][name][1])
        scale = np.abs(np.asarray(weights)).max(0) / 3
        expected = reference(weights, behind[f"layers/{path}"], 3)
        # A rounding that float32 decides the other way moves what comes after it.
        assert (np.abs(got - expected) < 1e-3 * scale).mean() > 0.98
        # What GPTQ reports is the error in the output of the damped problem.
        x = behind[f"layers/{path}"]
        hessian = 2 * x.T @ x
        hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
        change = got - np.asarray(weights, np.float64)
        error = 0.5 * np.einsum("io,ij,jo->", change, hessian, change)
        np.testing.assert_allclose(result.losses[f"layers/{path}"][1], error, rtol=1e-2)
        other = reference(weights, full[f"layers/{path}"], 3)
        assert (np.abs(got - other) < 1e-3 * scale).mean() < 0.98


@pytest.mark.slow
def test_true_sequential_reads_inputs_behind_the_matrices_before():
    """The down projection's inputs are those behind the other matrices on their grids."""
    model, params, _ = trained()
    rules = default_rules(3, absmax)
    result = gptq_model(model, params, CALIBRATION, rules, true_sequential=True)
    layers = jax.tree.map(lambda x: x, result.params["layers"])
    x = inputs_of(model, result.params | {"layers": layers}, CALIBRATION, 0)["layers/mlp/down"]
    weights = params["layers"]["mlp"]["down"][0]
    expected = reference(weights, x, 3)
    scale = np.abs(np.asarray(weights)).max(0) / 3
    for found, least in ((result, True), (quantized(3), False)):
        got = np.asarray(found.params["layers"]["mlp"]["down"][0])
        share = (np.abs(got - expected) < 1e-3 * scale).mean()
        assert (share > 0.98) == least


@pytest.mark.slow
def test_act_order_and_static_groups_are_those_of_one_matrix():
    model, params, _ = trained()
    rules = default_rules(3, absmax, granularity="group", group_size=16)
    options = {"act_order": True, "static_groups": True}
    result = gptq_model(model, params, CALIBRATION, rules, **options)
    x = inputs_of(model, result.params, CALIBRATION, 0)[QUERY]
    weights = params["layers"]["attention"]["query"][0]
    one = gptq(weights, calibration_hessian(jnp.asarray(x, jnp.float32)), rules(QUERY), **options)
    got = np.asarray(result.params["layers"]["attention"]["query"][0])
    assert (np.abs(got - one.weights) < 1e-4).mean() > 0.98
    plain = gptq_model(model, params, CALIBRATION, rules).params["layers"]["attention"]["query"][0]
    assert (np.abs(got - plain) < 1e-4).mean() < 0.9


def test_damping_grows_until_there_is_a_factor(monkeypatch):
    """A Hessian that is not positive definite until it was damped three times."""
    model, params = tiny.model(), tiny.params(tiny.model())
    tried = []

    def fails_twice(weights, hessian, quantizer, damping, *options):
        tried.append(round(float(damping), 4))
        result = _gptq(weights, hessian, quantizer, damping, *options)
        return result if len(tried) % 3 == 0 else result._replace(loss=jnp.nan)

    _gptq = after_training._gptq
    monkeypatch.setattr(after_training, "_gptq", fails_twice)
    rules = default_rules(3, absmax)
    gptq_model(model, params, CALIBRATION[:1], lambda path: rules(path) if path == QUERY else None)
    assert tried[:3] == [0.01, 0.02, 0.03]
    monkeypatch.setattr(
        after_training, "_gptq", lambda *a: _gptq(*a)._replace(loss=jnp.nan), raising=True
    )
    with pytest.raises(InputError, match=r"no Cholesky factor, damped by up to 0\.5"):
        gptq_model(model, params, CALIBRATION[:1], rules)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3])
def test_beats_rounding_to_nearest(bits):
    model, params, loss = trained()
    result = quantized(bits)
    nearest = round_to_nearest_model(params, default_rules(bits, absmax))
    for layer in range(2):
        inputs = inputs_of(model, result.params, CALIBRATION, layer)
        for path in MATRICES:
            module, name = path.split("/")
            weights, by_gptq, by_rounding = (
                np.asarray(p["layers"][module][name][layer], np.float64)
                for p in (params, result.params, nearest.params)
            )
            x = inputs[f"layers/{path}"]
            errors = [np.square(x @ (q - weights)).sum() for q in (by_gptq, by_rounding)]
            assert errors[0] < errors[1], (path, layer)
    held_out = [text(seed) for seed in range(2000, 2004)]
    full, gptq_loss, rtn_loss = (
        np.mean([loss(p, batch) for batch in held_out])
        for p in (params, result.params, nearest.params)
    )
    assert full < gptq_loss < rtn_loss


def test_round_to_nearest_is_the_quantizer():
    _, params, _ = trained()
    rules = default_rules(2)
    nearest = round_to_nearest_model(params, rules)
    expected = jax.jit(lambda p: quantize_tree(p, init_scales(p, rules), rules))(params)
    for got, want in zip(*map(jax.tree.leaves, (nearest.params, expected)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [16, 32])
def test_sixteen_bits_are_the_model_itself(bits):
    model, params, _ = trained()
    for result in (
        gptq_model(model, params, CALIBRATION, default_rules(bits, absmax)),
        round_to_nearest_model(params, default_rules(bits, absmax)),
    ):
        assert not result.coded
        same = jax.tree.map(lambda a, b: a is b, result.params, params)
        assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_an_identity_hessian_is_rounding_to_nearest(monkeypatch):
    def identity(inputs, importance=None):
        return jnp.eye(inputs.shape[-1])

    model, params, _ = trained()
    rules = default_rules(3, absmax)
    usual = quantized(3)  # Before the patch: it is shared with other tests.
    monkeypatch.setattr(after_training, "calibration_hessian", identity)
    result = gptq_model(model, params, CALIBRATION[:1], rules)
    nearest = round_to_nearest_model(params, rules)
    for got, want in zip(*map(jax.tree.leaves, (result.params, nearest.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    other = usual.params["layers"]["mlp"]["up"]
    assert (np.abs(other - nearest.params["layers"]["mlp"]["up"]) > 1e-4).mean() > 0.05


def test_padding_does_not_count_and_layers_share_programs():
    """Rows of padding, whatever their tokens, change no code; two programs run a layer."""
    model, params, _ = trained()
    traced = []

    def block(*arguments, **options):
        traced.append(1)
        return model.block(*arguments, **options)

    padded = [
        {n: jnp.concatenate([x, jnp.full_like(x, 5 if n == "tokens" else 0)]) for n, x in b.items()}
        for b in CALIBRATION
    ]
    counted = model._replace(block=block)
    result = gptq_model(counted, params, padded, default_rules(3, absmax))
    assert len(traced) == 2
    same = [result.coded[path].codes == c.codes for path, c in quantized(3).coded.items()]
    assert min(np.mean(s) for s in same) > 0.98  # sums in another order


def test_attention_received():
    """Against the attention itself, read off with values that are one-hot."""
    model, params, _ = trained()
    c, batch = model.config, CALIBRATION[0]
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    x = model.embed(params, batch["tokens"], batch["positions"])
    where = batch["positions"], batch["segment_ids"]
    got = jax.jit(lambda *a: attention_received(model, *a))(layer, x, *where)

    def columns(layer, x):
        """Attention [B, T, N, S], as many keys at a time as a head has channels."""
        found = []

        def product(start, path, inputs, weights, scale):
            if path == "layers/attention/value":
                # The value of token j is one-hot in j: an output is its row of attention.
                values = jnp.eye(inputs.shape[1])[None, :, None, start : start + c.head_width]
                values = jnp.broadcast_to(values, (*inputs.shape[:2], c.kv_heads, c.head_width))
                return values.reshape(*inputs.shape[:2], -1)
            if path == "layers/attention/output":
                found.append(inputs.reshape(*inputs.shape[:2], c.heads, c.head_width))
            return inputs @ weights

        for start in range(0, x.shape[1], c.head_width):
            model.block(layer, x, *where, functools.partial(product, start))
        return jnp.concatenate(found, axis=-1)

    attention_BTNS = jax.jit(columns)(layer, x)
    np.testing.assert_allclose(attention_BTNS.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(got, attention_BTNS.sum((1, 2)), rtol=1e-4)


def test_importance():
    """RSQ with all tokens alike is GPTQ; otherwise it is not."""
    model, params, _ = trained()
    rules = default_rules(3, absmax)
    plain = quantized(3)
    alike = gptq_model(model, params, CALIBRATION, rules, jnp.ones_like)
    rsq = gptq_model(model, params, CALIBRATION, rules, rsq_importance)
    path = "layers/mlp/down"
    assert (alike.coded[path].codes == plain.coded[path].codes).mean() > 0.99
    assert (rsq.coded[path].codes == plain.coded[path].codes).mean() < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{"tied_head": True}, {"param_dtype": "bfloat16"}], ids=str)
def test_packs_as_it_is(overrides, tmp_path):
    """Moving groups have grids that no quantizer finds again in the weights; the file has them."""
    model = tiny.model(**overrides)
    params = tiny.params(model)
    rules = default_rules(4, absmax, granularity="group", group_size=16)
    result = gptq_model(model, params, CALIBRATION[:1], rules)
    assert ("head/kernel" in result.coded) == (not overrides.get("tied_head", False))
    again = quantize_tree(result.params, init_scales(result.params, rules), rules)
    assert (again["layers"]["mlp"]["up"] != result.params["layers"]["mlp"]["up"]).any()
    path = tmp_path / "model.safetensors"
    write_packed(path, result.leaves(), config={}, vocab_size=tiny.VOCAB, tokenizer="", step=0)
    found = read_packed(path).params
    assert jax.tree.structure(found) == jax.tree.structure(result.params)
    for got, want in zip(*map(jax.tree.leaves, (found, result.params)), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_refuses():
    model, params, _ = trained()
    table = jax.tree.map(lambda a: a, params) | {
        "head": {"kernel": params["head"]["kernel"] * jnp.nan}
    }
    with pytest.raises(InputError, match="GPTQ of head/kernel"):
        gptq_model(model, table, CALIBRATION[:1], default_rules(4, absmax))
    layers = params["layers"] | {"router": params["layers"]["mlp"]["up"]}
    with pytest.raises(ValueError, match="layers/router is of no known kind"):
        gptq_model(model, params | {"layers": layers}, CALIBRATION[:1], default_rules(4, absmax))


@pytest.mark.slow
def test_layers_of_one_stack_have_their_own_widths(tmp_path):
    """In GPTQ, with scales of another type, as integers, and in the file."""
    model = tiny.model()
    params, batches = tiny.params(model), [text(0, rows=4)]
    plain = default_rules(4, absmax)
    plan = {"layers/mlp/up": (4, 2), "layers/attention/query": (3, 8)}
    rules = with_widths(plain, plan, of_width(absmax))
    result = gptq_model(model, params, batches, rules)
    uniform = gptq_model(model, params, batches, plain)
    up, query = (result.coded[path] for path in plan)
    # The first layer depends on nothing behind it.
    np.testing.assert_array_equal(up.codes[0], uniform.coded["layers/mlp/up"].codes[0])
    assert up.codes[1].max() <= 3 < uniform.coded["layers/mlp/up"].codes[1].max()
    assert query.codes[0].max() <= 7 < 100 < query.codes[1].max()
    rounded = after_training.with_scales(result, "float16")
    scale = np.asarray(rounded.coded["layers/mlp/up"].grid.scale)
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    grid = integer_grid("layers/mlp/up", rounded.coded["layers/mlp/up"])
    np.testing.assert_array_equal(
        grid.codes_LIO * grid.scale_LGO, rounded.params["layers"]["mlp"]["up"]
    )
    about = {"config": {}, "vocab_size": tiny.VOCAB, "tokenizer": "", "step": 0}
    write_packed(tmp_path / "model.safetensors", rounded.leaves(), **about)
    found = read_packed(tmp_path / "model.safetensors")
    assert found.quantizers["layers/attention/query"].widths == (3, 8)
    for a, b in zip(*map(jax.tree.leaves, (found.params, rounded.params)), strict=True):
        np.testing.assert_array_equal(a, b)
