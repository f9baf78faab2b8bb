"""Every loss is the dense one, with its gradients, and has its published toy values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives.losses import LOSSES, Inputs, Loss, Teacher, logits, training_statistics
from objectives.losses.overlap import tversky_index
from objectives.losses.tempnet import tempered_loss
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


def of_logits(loss: Loss, z, target: int, **options):
    """(loss, d loss / d z) of one token whose logits are `z`: the head is the identity."""
    x = Inputs(
        jnp.asarray([[z]], jnp.float32),
        jnp.eye(len(z)),
        jnp.full((1, 1), target, jnp.int32),
        block_size=2,
        **options,
    )
    (total, _), (dz, _, _) = run(loss, x)
    return float(total), np.asarray(dz[0, 0])


TOY = [2.0, 1.0, 0.0]


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.388889), (0.0, 0.071429)])
def test_dice_of_one_token(alpha, expected):
    z = np.log([0.8, 0.1, 0.1])
    assert of_logits(LOSSES["dice"](alpha=alpha, smooth=1.0), z, 0)[0] == pytest.approx(
        expected, abs=1e-5
    )


def test_tversky_of_one_token_and_where_it_is_dice():
    total, _ = of_logits(LOSSES["tversky"](alpha=0.3, beta=0.7, smooth=1.0), np.log([0.8, 0.2]), 0)
    assert total == pytest.approx(1 - 0.9, abs=1e-5)
    p = jnp.asarray([0.3, 0.9, 0.05])
    ones = jnp.ones(3)
    ours = 1 - tversky_index(p.sum(), 0.0, (1 - p).sum(), 0.5, 0.5, 0.2)
    np.testing.assert_allclose(LOSSES["dice"](smooth=0.4).reduce(p, ones), ours, rtol=1e-6)


def test_inverted_hinge_of_one_token():
    loss = LOSSES["inverted_hinge"]()
    assert of_logits(loss, np.log([0.7, 0.2, 0.1]), 0)[0] == pytest.approx(1.5, abs=1e-5)
    assert of_logits(loss, np.log([0.7, 0.2, 0.1]), 1)[0] == pytest.approx(0.5, abs=1e-5)
    total, dz = of_logits(loss, TOY, 0)
    assert total == pytest.approx(1.420512, abs=1e-5)
    np.testing.assert_allclose(dz, [0.385499, -0.34764, -0.037859], atol=1e-5)
    assert of_logits(loss, [50.0, 0.0, 0.0], 0)[0] == 2
    assert of_logits(loss, [50.0, 0.0, 0.0], 1)[0] == 0


ROLLOUT = np.asarray([-0.244965, 0.179084, 0.065881])


def test_the_expected_rollout_is_fine_tuning_by_probability():
    _, dz = of_logits(LOSSES["one_token_rollout"](samples=0, beta=-0.1), TOY, 0)
    np.testing.assert_allclose(dz, ROLLOUT, atol=1e-5)
    p = jax.nn.softmax(jnp.asarray(TOY))
    np.testing.assert_allclose(dz, 1.1 * p[0] * (p - jnp.asarray([1.0, 0, 0])), atol=1e-6)


@pytest.mark.parametrize("temperature", tiny.mostly_slow([1.0, 1.7], (1.7,)))
def test_sampled_rollouts_average_to_the_expected_one(temperature):
    tokens, hyper = 3000, {"temperature": temperature, "beta": -0.1}
    x = Inputs(
        jnp.broadcast_to(jnp.asarray(TOY), (1, tokens, 3)),
        jnp.eye(3),
        jnp.zeros((1, tokens), jnp.int32),
        block_size=2,
        keys=jax.random.split(jax.random.key(0), (1, tokens)),
    )
    (_, losses), (dz, _, _) = run(LOSSES["one_token_rollout"](samples=7, **hyper), x)
    total, expected = of_logits(LOSSES["one_token_rollout"](samples=0, **hyper), TOY, 0)
    error = np.asarray(dz[0]).std(0) / tokens**0.5
    assert (error > 0).all()
    assert (np.abs(dz[0].mean(0) - expected) < 4 * error).all()
    assert abs(losses.mean() - total) < 4 * losses.std() / tokens**0.5
    # Negative control: the expectation at another temperature is outside of that.
    _, other = of_logits(LOSSES["one_token_rollout"](samples=0, beta=-0.1, temperature=3.0), TOY, 0)
    assert (np.abs(dz[0].mean(0) - other) > 4 * error).any()


def test_every_draw_is_counted_once_whatever_the_blocks():
    """With rewards of 1 throughout, loss and gradient count draws: they sum to 0, to 1 in all."""
    x = inputs()
    loss = LOSSES["one_token_rollout"](samples=50, beta=1.0)
    (_, losses), (dhidden, dhead, _) = run(loss, x)
    (_, others), other = run(loss, x._replace(block_size=3))
    close((losses, dhidden, dhead), (others, *other[:2]))
    drawn = jax.nn.softmax(x.hidden @ x.head)
    identity = x._replace(hidden=x.hidden @ x.head, head=jnp.eye(V))
    _, (dz, _, _) = run(loss, identity)
    counts = (drawn - dz) * 50
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    np.testing.assert_allclose(counts.sum(-1), 50, rtol=1e-5)


CENTRES = jnp.asarray([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]]).T


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [(1.0, [0.689655, 0.137931, 0.172414]), (2.0, [0.907029, 0.036281, 0.056689])],
)
def test_harmonic_probabilities(exponent, expected):
    loss = LOSSES["harmonic"](exponent=exponent, epsilon=0.0)
    x = Inputs(jnp.asarray([[[1.0, 0.0]]]), CENTRES, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(jax.nn.softmax(logits(loss, x))[0, 0], expected, atol=1e-5)
    assert training_statistics(loss, x, jnp.ones((1, 1))).loss == pytest.approx(
        -np.log(expected[0]), abs=1e-5
    )


@pytest.mark.parametrize(
    "distance",
    tiny.mostly_slow(["euclidean", "cosine", "bray_curtis", "mahalanobis"], ("euclidean",)),
)
def test_harmonic_losses_have_no_scale(distance):
    x = inputs(params=PRECISION)
    scaled = x._replace(hidden=7 * x.hidden, head=7 * x.head)
    loss = LOSSES["harmonic"](distance=distance, epsilon=0.0)
    close(value(loss, scaled)[1], value(loss, x)[1])
    kept = LOSSES["harmonic"](distance=distance, epsilon=0.3)
    if distance in ("euclidean", "mahalanobis"):
        with pytest.raises(AssertionError):
            close(value(kept, scaled)[1], value(kept, x)[1], 1e-3)


@pytest.mark.parametrize(
    ("tau", "rho", "expected"),
    [
        (1.0, np.log(3), 0.407606),
        (2.0, np.log(3), 1.360539),
        (1.0, 0.0, -0.691006),
        (2.0, 0.0, -0.836685),
    ],
)
def test_tempered_loss_and_its_slope_in_the_temperature(tau, rho, expected):
    z = jnp.asarray(TOY)

    def f(tau):
        return tempered_loss(-jax.nn.log_softmax(z / tau)[0], tau, rho, 3)

    total, slope = jax.value_and_grad(f)(tau)
    assert total == pytest.approx(expected, abs=1e-5)
    p = jax.nn.softmax(z / tau)
    assert slope == pytest.approx(rho - float(jnp.sum(p * jnp.log(3 * p))), abs=1e-5)


def test_tempnet_at_one_temperature_is_cross_entropy():
    loss = LOSSES["tempnet"](rho=np.log(V), tau_min=1.0, tau_max=1.0 + 1e-7, width=3, dropout=0.0)
    x = inputs(params=loss.init(jax.random.key(0), V, D))
    close(run(loss, x)[1][:2], run(Loss(), x)[1][:2])


def test_dropout_of_tempnet_is_of_the_keys():
    loss = LOSSES["tempnet"](width=16)
    x = inputs(params=loss.init(jax.random.key(0), V, D))
    a, b = (value(loss, x._replace(keys=k))[1] for k in (x.keys, x.keys[::-1]))
    assert np.abs(a - b).min() > 0
    np.testing.assert_array_equal(value(loss, x)[1], a)
    # Evaluation has no keys, and no dropout.
    plain = LOSSES["tempnet"](width=16, dropout=0.0)
    np.testing.assert_array_equal(
        logits(loss, x._replace(keys=None)), logits(plain, x._replace(keys=None))
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    x = inputs()
    x = x._replace(teachers={"teacher": Teacher(x.hidden, x.head, products())})
    (_, losses), gradients = run(LOSSES["block_distillation"](), x)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    assert all(np.abs(g).max() < 1e-5 for g in jax.tree.leaves(gradients))


def test_without_a_share_of_the_teacher_it_is_cross_entropy_bit_for_bit():
    found = run(LOSSES["distillation"](share=0.0), inputs())
    jax.tree.map(np.testing.assert_array_equal, found, run(LOSSES["cross_entropy"](), inputs()))


def test_one_pass_gives_the_statistics_of_the_student_with_their_gradients():
    x = inputs()

    def total(hidden, head, statistics):
        found = statistics(x._replace(hidden=hidden, head=head))[:4]
        return sum((i + 1) * jnp.sum(field) for i, field in enumerate(found)), found

    taught, plain = (
        jax.value_and_grad(lambda *a, f=f: total(*a, f), (0, 1), has_aux=True)(x.hidden, x.head)
        for f in (
            LOSSES["distillation"](share=1.0).statistics,
            lambda x: training_statistics(LOSSES["cross_entropy"](), x, jnp.ones((2, 5))),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), taught, plain)


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
