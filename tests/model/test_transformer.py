import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.interface import LayerProducts
from lm.model.rotary import rotate

VARIANTS = [
    {},
    {"norm": "layernorm", "activation": "swiglu", "kv_heads": 1},
    {"activation": "relu2", "qk_norm": True, "kv_heads": 4, "tied_head": True},
]


def logits(model, params, b):
    hidden = tiny.hidden(model, params, b)
    return hidden @ model.head(params)


@pytest.fixture(scope="module", params=tiny.mostly_slow(VARIANTS, VARIANTS[:2]), ids=str)
def made(request):
    model = tiny.model(**request.param)
    return model, tiny.params(model), jax.jit(lambda p, b: logits(model, p, b))


def reference(c, params, b):
    """Logits, and the attention [B, N, T, T] of the last layer: the whole forward pass in float64
    NumPy, with loops where the model has tensors."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tokens, positions, segments = (np.asarray(b[k]) for k in ("tokens", "positions", "segment_ids"))
    n, k, h = c.heads, c.kv_heads, c.head_width

    def norm(x, w, kind):
        x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"] + w.get("bias", 0)

    def turn(x, t):
        angle = t * c.rope_base ** (-np.arange(h // 2) / (h // 2))
        z = (x[: h // 2] + 1j * x[h // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag])

    out, attention = [], np.zeros((len(tokens), n, *tokens.shape[1:] * 2))
    for row in range(len(tokens)):
        x = p["embedding"]["table"][tokens[row]] * np.sqrt(c.width)
        for layer in range(c.layers):
            w = jax.tree.map(lambda x, layer=layer: x[layer], p["layers"])
            y = norm(x, w["attention_norm"], c.norm)
            q, key, v = (
                (y @ w["attention"][name]).reshape(len(y), -1, h)
                for name in ("query", "key", "value")
            )
            if c.qk_norm:
                q = norm(q, w["attention"]["query_norm"], "rmsnorm")
                key = norm(key, w["attention"]["key_norm"], "rmsnorm")
            mixed = np.zeros_like(q)
            for t in range(len(y)):
                seen = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
                for i in range(n):
                    j = i // (n // k)
                    one = turn(q[t, i], positions[row, t])
                    score = [one @ turn(key[s, j], positions[row, s]) / np.sqrt(h) for s in seen]
                    weight = np.exp(score - np.max(score))
                    mixed[t, i] = weight @ v[seen, j] / weight.sum()
                    attention[row, i, t, seen] = weight / weight.sum()
            x = x + mixed.reshape(len(y), n * h) @ w["attention"]["output"]
            y = norm(x, w["mlp_norm"], c.norm)
            up = y @ w["mlp"]["up"]
            if c.activation == "swiglu":
                gate = y @ w["mlp"]["gate"]
                up = up * gate / (1 + np.exp(-gate))
            elif c.activation == "relu2":
                up = np.maximum(up, 0) ** 2
            else:
                up = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            x = x + up @ w["mlp"]["down"]
        head = p["embedding"]["table"].T if c.tied_head else p["head"]["kernel"]
        out.append(norm(x, p["final_norm"], c.norm) @ head)
    return np.stack(out), attention


def stirred(params):
    """No norm is 1, no bias is 0."""
    return jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)


def test_equals_float64_reference(made):
    model, params, run = made
    params = stirred(params)
    b = tiny.batch(rows=2)
    expected, _ = reference(model.config, params, b)
    np.testing.assert_allclose(run(params, b), expected, atol=2e-4)


def attention_of(outputs):
    return outputs.hidden, outputs.aux["attention_to"]


def share(model, params, b, to):
    return attention_of(model.apply(params, tiny.inputs(b), taps={"attention_to": to}))


def test_the_attention_of_the_last_layer_equals_a_dense_float64_reference(made):
    """And that of the first layer is another: a negative control."""
    model, params, _ = made
    params, b = stirred(params), tiny.batch(rows=2)
    to = np.random.default_rng(1).random((2, 16)) < 0.4
    run = jax.jit(lambda params, to: share(model, params, b, to))
    hidden, got = run(params, to)
    _, attention = reference(model.config, params, b)
    expected = (attention * to[:, None, None]).sum(-1).mean(1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(run(params, np.ones_like(to))[1], 1, atol=1e-6)
    plain = tiny.hidden(model, params, b)
    np.testing.assert_allclose(hidden, plain, atol=5e-6)
    upside_down = {**params, "layers": jax.tree.map(lambda x: x[::-1], params["layers"])}
    assert np.abs(run(upside_down, to)[1] - expected).max() > 0.01


def test_the_attention_sees_the_products_and_scales_of_the_layers():
    """Where a product scales the queries' weights, it is that of a model with such weights."""
    model, b = tiny.model(), tiny.batch(rows=2)
    params, to = stirred(tiny.params(model)), tiny.batch(rows=2)["weights"] == 0
    shape = (model.config.layers,)
    scales = {"attention": {"query": jnp.full(shape, 0.5), "key": ()}, "mlp": {"up": ()}}

    def product(path, x_BTD, w_DF, scale):
        scaled = path == "layers/attention/query"
        assert isinstance(scale, tuple) != scaled
        return x_BTD @ (w_DF * scale if scaled else w_DF)

    layers = LayerProducts(product, scales)
    taps = {"attention_to": to}
    hidden, got = attention_of(model.apply(params, tiny.inputs(b), products=layers, taps=taps))
    halved = jax.tree.map(lambda x: x, params)
    halved["layers"]["attention"]["query"] /= 2
    expected_hidden, expected = share(model, halved, b, to)
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-5)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(share(model, params, b, to)[1] - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"unroll": 2}, {"layers": 1}], ids=str)
def test_the_attention_is_a_constant_to_gradients(change):
    model, b = tiny.model(**change), tiny.batch()
    params, to = tiny.params(model), tiny.batch()["weights"] == 0
    _, constant = share(model, params, b, to)

    def loss(params, constant=None):
        hidden, got = share(model, params, b, to)
        return jnp.sum(jnp.square(hidden).mean(-1) * (got if constant is None else constant))

    grads = jax.jit(jax.grad(loss))(params)
    expected = jax.jit(jax.grad(loss))(params, constant)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_attention_costs_queries_and_keys_of_one_layer_and_no_square():
    """FLOPs and memory of the compiled program."""
    rows, length = 4, 512
    model, b = tiny.model(unroll=1), tiny.batch(rows, length)
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def cost(function):
        compiled = jax.jit(function).lower(shapes).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    def hidden(params):
        return tiny.hidden(model, params, b)

    c, to = model.config, b["weights"] == 0
    flops, memory = cost(hidden)
    more_flops, more_memory = cost(lambda params: share(model, params, b, to))
    projections = 2 * rows * length * c.width * c.head_width * (c.heads + c.kv_heads)
    square = rows * c.heads * length**2
    products = 2 * square * c.head_width
    # Blocks of queries see a little more than half of the square; the softmax of each entry of it
    # costs some ten operations, much beside heads of 8 channels.
    added = more_flops - flops
    assert projections + products / 2 < added < projections + products + 10 * square
    assert more_memory - memory < square


def test_future_and_foreign_tokens_change_no_logit(made):
    _, params, run = made
    b = tiny.batch(rows=1, length=12)
    before = run(params, b)
    segments = b["segment_ids"]
    moved = 0
    for s in range(12):
        changed = {**b, "tokens": b["tokens"].at[0, s].set((b["tokens"][0, s] + 5) % tiny.VOCAB)}
        same = np.asarray(run(params, changed) == before).all(-1)[0]
        for t in range(12):
            sees = t >= s and segments[0, t] == segments[0, s]
            assert same[t] != sees, (s, t)
            moved += bool(sees)
    assert moved > 12


def test_packed_documents_equal_the_same_alone(made):
    _, params, run = made
    b = tiny.batch(rows=1, length=16)
    packed = run(params, b)[0]
    for segment in (1, 2):
        where = np.flatnonzero(b["segment_ids"][0] == segment)
        alone = {k: jnp.zeros_like(v).at[:, : len(where)].set(v[:, where]) for k, v in b.items()}
        out = run(params, alone)[0, : len(where)]
        np.testing.assert_allclose(out, packed[where], atol=1e-5)


def test_only_relative_positions_matter(made):
    _, params, run = made
    b = tiny.batch(rows=2)
    shifted = {**b, "positions": b["positions"] + 100}
    np.testing.assert_allclose(run(params, shifted), run(params, b), atol=2e-3)


@pytest.mark.parametrize(
    "change",
    tiny.mostly_slow([{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}], ({"remat": "full"},)),
    ids=str,
)
def test_same_function_by_other_means(change):
    """Recomputation and unrolling change neither losses nor gradients."""
    b = tiny.batch()

    def loss_and_grad(model):
        params = tiny.params(model)
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(logits(model, p, b)).mean()))(params)

    for x, y in zip(
        jax.tree.leaves(loss_and_grad(tiny.model())),
        jax.tree.leaves(loss_and_grad(tiny.model(**change))),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_remat_recomputes():
    """Negative control: the policy reaches the compiled program."""

    def temporaries(remat):
        model = tiny.model(layers=8, remat=remat)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        b = tiny.batch(rows=8, length=128)
        grad = jax.jit(jax.grad(lambda p: logits(model, p, b).sum()))
        return grad.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


@pytest.mark.slow
def test_starts_with_the_loss_of_a_guess():
    """Logits of about unit variance at initialisation: the loss is near ln V + 1/2."""
    model = tiny.model(width=128)
    b = tiny.batch(rows=8, length=64)
    out = logits(model, tiny.params(model), b)
    assert 0.7 < out.std() < 1.3
    loss = jax.nn.logsumexp(out, -1) - jnp.take_along_axis(out, b["targets"][..., None], -1)[..., 0]
    assert abs(loss.mean() - np.log(tiny.VOCAB) - 0.5) < 0.25


def test_compute_dtype_is_apart_from_parameter_dtype():
    model = tiny.model(dtype="bfloat16")
    params = tiny.params(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    b = tiny.batch()
    hidden = tiny.hidden(model, params, b)
    assert hidden.dtype == jnp.bfloat16
    full = logits(tiny.model(), params, b)
    np.testing.assert_allclose(np.float32(hidden @ model.head(params)), full, atol=0.15)


def test_rotation_keeps_norms():
    x = jax.random.normal(jax.random.key(0), (1, 2, 5, 8))
    angle = jnp.arange(20.0).reshape(1, 5, 4)
    turned = rotate(x, jnp.sin(angle), jnp.cos(angle))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_config_keys_are_those_of_the_base_config():
    fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"vocab_size"}
    assert fields == set(base.get_config().model)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"heads": 3}, "model.heads=3"),
        ({"kv_heads": 3}, "model.kv_heads=3"),
        ({"norm": "rmsnrm"}, "did you mean 'rmsnorm'"),
        ({"width": 4}, "must be even"),
        ({"layers": 0}, "model.layers=0"),
        ({"unroll": 3}, "model.unroll=3"),
        ({"logit_softcap": -1.0}, "model.logit_softcap"),
        ({"rope_base": 0.0}, "model.rope_base"),
    ],
)
def test_refuses(change, names):
    with pytest.raises(InputError, match=names):
        tiny.model(**change)


def test_a_norm_may_have_a_bias():
    """In front of sub-blocks and the head, not on queries and keys; off, there is none."""
    plain, biased = (tiny.model(norm_bias=on, qk_norm=True) for on in (False, True))
    params, more = tiny.params(plain), tiny.params(biased)
    paths = {jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(more)}
    paths -= {jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)}
    at = {"['layers']['attention_norm']", "['layers']['mlp_norm']", "['final_norm']"}
    assert paths == {f"{norm}['bias']" for norm in at}
    batch, run = tiny.batch(2, 8), jax.jit(lambda p: tiny.hidden(biased, p, tiny.batch(2, 8)))
    zeros = {**more, "final_norm": {"scale": params["final_norm"]["scale"], "bias": jnp.zeros(32)}}
    np.testing.assert_array_equal(
        run(zeros), jax.jit(tiny.hidden, static_argnums=0)(plain, params, batch)
    )
    ones = {**more, "final_norm": {**zeros["final_norm"], "bias": jnp.ones(32)}}
    np.testing.assert_allclose(run(ones), run(zeros) + 1, atol=1e-6)
