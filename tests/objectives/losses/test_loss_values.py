"""Each loss has its published toy values and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_each_loss import PRECISION, D, V, close, inputs, run, value

from objectives.losses import LOSSES, Inputs, Loss, Teacher, logits, training_statistics
from objectives.losses.overlap import tversky_index
from objectives.losses.tempnet import tempered_loss
from objectives.vocabulary import products


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
