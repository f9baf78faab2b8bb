"""Every loss is the dense one, with its gradients, in memory that does not hold the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives.losses import LOSSES, Inputs, Loss, Teacher, training_statistics
from objectives.terms import masked_sum
from objectives.vocabulary import products

V, D, BLOCK = 41, 6, 16


def inputs(rows=2, length=5, seed=0, **options) -> Inputs:
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), (rows, length))
    return Inputs(
        jnp.asarray(rng.standard_normal((rows, length, D)), jnp.float32),
        jnp.asarray(rng.standard_normal((D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32),
        block_size=BLOCK,
        keys=keys,
        teachers={
            "teacher": Teacher(
                jnp.asarray(rng.standard_normal((rows, length, 3)), jnp.float32),
                jnp.asarray(rng.standard_normal((3, V)), jnp.float32),
                products(),
            )
        },
        **options,
    )


def value(loss: Loss, x: Inputs, weights=None):
    """The losses of all tokens and their mean, or the reduced loss."""
    weights = jnp.ones(x.targets.shape) if weights is None else weights
    losses = training_statistics(loss, x, weights).loss
    if loss.reduce is None:
        return masked_sum(weights, losses), losses
    return loss.reduce(losses, weights), losses


def run(loss: Loss, x: Inputs, weights=None):
    """((value, losses), d value / d (hidden, head, params)), jitted."""

    def f(hidden, head, params):
        return value(loss, x._replace(hidden=hidden, head=head, params=params), weights)

    return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(x.hidden, x.head, x.params)


def dense_log_p(x: Inputs):
    z = x.hidden @ x.head
    return jax.nn.log_softmax(x.softcap * jnp.tanh(z / x.softcap) if x.softcap else z)


def pick(array_BTV, x: Inputs):
    return jnp.take_along_axis(array_BTV, x.targets[..., None], -1)[..., 0]


def dense_nll(x):
    return -pick(dense_log_p(x), x)


def dense_dice(x, w):
    p = jnp.exp(-dense_nll(x))
    q = (1 - p) ** 1.5 * p
    return 1 - (2 * jnp.sum(w * q) + 0.5) / (jnp.sum(w * q) + w.sum() + 0.5)


def dense_squared_dice(x, w):
    p = jnp.exp(-dense_nll(x))
    return 1 - (2 * jnp.sum(w * p) + 1e-4) / (jnp.sum(w * p**2) + w.sum() + 1e-4)


def dense_tversky(x, w):
    hits = jnp.sum(w * jnp.exp(-dense_nll(x)))
    return 1 - (hits + 1) / (w.sum() + 1)


def dense_hinge(x):
    p = jnp.exp(dense_log_p(x))
    others = jnp.where(jax.nn.one_hot(x.targets, V) > 0, -1.0, p)
    return 1 + pick(p, x) - others.max(-1)


def dense_rollout(x, temperature, beta):
    log_p = dense_log_p(x)
    drawn = jax.lax.stop_gradient(jax.nn.softmax(log_p / temperature))
    reward = jnp.where(jax.nn.one_hot(x.targets, V) > 0, 1.0, beta)
    return -jnp.sum(drawn * reward * log_p, -1)


def dense_harmonic(x, distance, exponent, epsilon, absolute=False):
    """All distances at once, in an array [B, T, V, D]."""
    a, b = x.hidden[:, :, None], x.head.T
    if distance == "cosine":
        d = 1 - jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    elif distance == "bray_curtis":
        below = jnp.abs(a) + jnp.abs(b) if absolute else jnp.abs(a + b)
        d = jnp.abs(a - b).sum(-1) / below.sum(-1)
    else:
        s = jnp.exp(x.params["log_precision"]) if distance == "mahalanobis" else 1.0
        d = jnp.sum(s * (a - b) ** 2, -1) / D
    return -pick(jax.nn.log_softmax(-exponent * jnp.log(d + epsilon)), x)


def dense_tau(x):
    p, z = x.params, jax.lax.stop_gradient(x.hidden @ x.head)
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    h = jax.nn.sigmoid(z @ p["first"] + p["first_bias"]) @ p["second"] + p["second_bias"]
    share = jax.nn.softmax(h / jnp.exp(p["log_scale"])) - 1 / h.shape[-1]
    return 0.5 + 4.5 * jax.nn.sigmoid((share * h) @ p["last"] + p["last_bias"])


def dense_tempnet(x):
    tau = dense_tau(x)
    nll = -pick(jax.nn.log_softmax(x.hidden @ x.head / tau[..., None]), x)
    return tau * nll + (2.0 - np.log(V)) * tau


def dense_distillation(x):
    teacher = x.teachers["teacher"]
    log_q = jax.nn.log_softmax(teacher.hidden @ teacher.head)
    return jnp.sum(jnp.exp(log_q) * (log_q - dense_log_p(x)), -1)


def dense_mixture(x):
    return 0.7 * dense_distillation(x) + 0.3 * dense_nll(x)


PRECISION = {"log_precision": jnp.linspace(-1.0, 1.0, D)}
NET = LOSSES["tempnet"](rho=2.0, width=7, dropout=0.0)
CASES = {
    "cross_entropy": (LOSSES["cross_entropy"](), dense_nll, {}),
    "dice": (LOSSES["dice"](alpha=1.5, smooth=0.5), dense_dice, {}),
    "dice squared": (LOSSES["dice"](squared=True), dense_squared_dice, {}),
    "tversky": (LOSSES["tversky"](), dense_tversky, {}),
    "inverted_hinge": (LOSSES["inverted_hinge"](), dense_hinge, {}),
    "rollout": (
        LOSSES["one_token_rollout"](samples=0, beta=-0.2),
        functools.partial(dense_rollout, temperature=1.0, beta=-0.2),
        {},
    ),
    "hot rollout": (
        LOSSES["one_token_rollout"](samples=0, temperature=1.7, beta=0.3),
        functools.partial(dense_rollout, temperature=1.7, beta=0.3),
        {},
    ),
    "tempnet": (NET, dense_tempnet, NET.init(jax.random.key(3), V, D)),
    "block_distillation": (LOSSES["block_distillation"](), dense_distillation, {}),
    "distillation": (LOSSES["distillation"](share=0.7), dense_mixture, {}),
} | {
    f"harmonic {name} {options}": (
        LOSSES["harmonic"](distance=name, exponent=2.5, epsilon=1e-3, **options),
        functools.partial(dense_harmonic, distance=name, exponent=2.5, epsilon=1e-3, **options),
        PRECISION if name == "mahalanobis" else {},
    )
    for name, options in (
        ("euclidean", {}),
        ("cosine", {}),
        ("bray_curtis", {}),
        ("bray_curtis", {"absolute": True}),
        ("mahalanobis", {}),
    )
}


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max() + 1e-9
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


@functools.cache
def gradients_of_nll(softcap):
    return run(Loss(), inputs(softcap=softcap))[1][:2]


@pytest.mark.parametrize(
    ("case", "softcap"),
    tiny.rows_mostly_slow(
        [(case, 0.0) for case in CASES]
        + [(case, 1.5) for case in ("dice", "inverted_hinge", "hot rollout", "distillation")],
        (0, 1, 4, 6, 7, 9, 12, 18),
    ),
)
def test_values_and_gradients_are_those_of_the_dense_computation(case, softcap):
    """With uneven weights, and NaN and no target in a token of weight 0."""
    loss, dense, params = CASES[case]
    x = inputs(params=params, softcap=softcap)
    weights = jnp.linspace(0.5, 2.0, x.targets.size).reshape(x.targets.shape).at[1, 2].set(0.0)

    def reference(hidden, head, params):
        clean = x._replace(hidden=hidden, head=head, params=params)
        return dense(clean, weights) if loss.reduce else jnp.sum(weights * dense(clean))

    expected = jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(x.hidden, x.head, x.params)
    poisoned = x._replace(
        hidden=x.hidden.at[1, 2].set(jnp.nan), targets=x.targets.at[1, 2].set(-100)
    )
    (total, _), gradients = run(loss, poisoned, weights)
    close((total, gradients), expected)
    assert not np.any(gradients[0][1, 2])
    # Negative control: the gradient of another loss is far away.
    with pytest.raises(AssertionError):
        close(gradients_of_nll(softcap), expected[1][:2], 1e-2)


LARGE = {
    "dice": LOSSES["dice"](),
    "inverted_hinge": LOSSES["inverted_hinge"](),
    "one_token_rollout": LOSSES["one_token_rollout"](samples=16),
    "tempnet": LOSSES["tempnet"](width=16),
    "bray_curtis": LOSSES["harmonic"](distance="bray_curtis"),
    "block_distillation": LOSSES["block_distillation"](),
    "distillation": LOSSES["distillation"](share=0.5),
}


@pytest.mark.parametrize("case", tiny.mostly_slow(LARGE, ("dice", "tempnet", "distillation")))
def test_no_array_of_tokens_by_vocabulary(case):
    loss, tokens, vocabulary = LARGE[case], (4, 256), 16_384
    hidden = jax.ShapeDtypeStruct((*tokens, 16), jnp.float32)
    head = jax.ShapeDtypeStruct((16, vocabulary), jnp.float32)
    params = jax.eval_shape(lambda: loss.init(jax.random.key(0), vocabulary, 16))

    def f(hidden, head, params, theirs):
        targets = jnp.zeros(tokens, jnp.int32)
        teachers = {name: Teacher(theirs, head, products()) for name in loss.teachers}
        keys = jax.random.split(jax.random.key(0), tokens)
        x = Inputs(hidden, head, targets, params, block_size=512, keys=keys, teachers=teachers)
        return value(loss, x)[0]

    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(hidden, head, params, hidden).compile()
    whole = 4 * 4 * 256 * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 3


BAD = {
    "dice": ({"alpha": -1.0}, "alpha=-1.0 must be at least 0"),
    "tversky": ({"smooth": -1.0}, "smooth=-1.0 must be at least 0"),
    "one_token_rollout": ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    "tempnet": ({"tau_max": 0.5}, "tau_max=0.5 must be above 0.5"),
    "harmonic": ({"distance": "euclid"}, "distance='euclid' is not one of: euclidean"),
    "block_distillation": ({"block_length": 0}, "block_length=0 must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyper_parameters_are_refused(name):
    hyper, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**hyper)
