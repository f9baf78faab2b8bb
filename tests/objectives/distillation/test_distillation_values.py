"""Published toy values, limits in which one method is another, and the memory of all."""

import dense_distillation as dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings
from jax import lax

from objectives import OBJECTIVES
from objectives.distillation.additive import added_up
from objectives.distillation.dhkd import binary_kl_norm
from objectives.distillation.nd import norm_and_direction
from objectives.distillation.pld import plackett_luce
from objectives.losses import LOSSES, Inputs, Teacher, training_statistics
from objectives.losses.base import Prediction
from objectives.terms import minimise
from objectives.vocabulary import products
from objectives.weighted import weighted
from objectives.weighting import uskd

S, T = [2.0, 1.0, 0.0], [1.0, 3.0, 0.0]


def of_logits(name, s=S, teachers=(T,), target=0, **hyper):
    """(loss, d loss / d logits) of one token: the heads are the identity, the second one, too."""
    loss, size = LOSSES[name](**hyper), len(s)
    named = {
        n: Teacher(jnp.asarray([[u]]), jnp.eye(size), products())
        for n, u in zip(loss.teachers, teachers, strict=True)
    }
    params = {"head": jnp.eye(size)} if name == "dhkd" else ()

    def f(z):
        x = Inputs(z, jnp.eye(size), jnp.full((1, 1), target), params, block_size=2, teachers=named)
        return training_statistics(loss, x, jnp.ones((1, 1))).loss.sum()

    total, dz = jax.jit(jax.value_and_grad(f))(jnp.asarray([[s]]))
    return float(total), np.asarray(dz[0, 0])


@pytest.mark.parametrize(
    ("name", "hyper", "expected"),
    [
        ("nkd", {}, 0.587578),
        ("nkd", {"gamma": 0.0}, 0.046547),
        ("pld", {}, 0.310875),
        ("dhkd", {"gamma": 0.0}, 0.604177),
        ("dhkd", {"gamma": 0.0, "divergence": "binary_kl"}, 0.472773),
    ],
)
def test_toy_values(name, hyper, expected):
    assert of_logits(name, **hyper)[0] == pytest.approx(expected, abs=1e-5)


def test_toy_values_of_align_distil_and_of_norm_and_direction():
    models = ([1.0, 0.0], [0.0, 1.0])
    line = np.array([[1.925234, -0.925234]])
    log_p, log_q = dense.log_softmax(np.array([[0.3, 0.0]])), dense.log_softmax(line)
    found, _ = of_logits("align_distil", [0.3, 0.0], models, beta2=1.0)
    assert found == pytest.approx(0.108081 * dense.reverse(log_p, log_q)[0], abs=1e-5)
    # Two models that agree are one teacher.
    agreeing, slope = of_logits("align_distil", S, (T, T))
    single, its = of_logits("distillation", S, (T,), divergence="reverse")
    np.testing.assert_allclose(agreeing, 0.1 / 1e-3 * single, rtol=1e-5)
    np.testing.assert_allclose(slope, 100 * its, rtol=1e-4, atol=1e-6)
    s, t, c = (jnp.asarray([[x]]) for x in ([3.0, 4.0], [1.0, 0.0], [1.0, 0.0]))
    assert norm_and_direction(s, t, c)[0, 0] == pytest.approx(0.4, abs=1e-6)
    assert norm_and_direction(t, t, c)[0, 0] == 0


def test_limits_of_the_mixture_are_the_divergences():
    kinds = {k: of_logits("distillation", divergence=k) for k in ("forward", "reverse")}
    for mixing, name, scale in ((1e-3, "forward", 1e3), (1 - 1e-3, "reverse", 1e3)):
        found, slope = of_logits("distillation", divergence="jensen_shannon", mixing=mixing)
        np.testing.assert_allclose(scale * found, kinds[name][0], rtol=5e-3)
        np.testing.assert_allclose(scale * slope, kinds[name][1], atol=5e-3)
        # Negative control: of the other divergence it is far.
        (other,) = set(kinds) - {name}
        assert abs(scale * found - kinds[other][0]) > 0.05 * kinds[other][0]


def test_a_temperature_is_that_of_both_logits_and_its_square_the_loss():
    for divergence in ("forward", "reverse", "jensen_shannon"):
        hot, _ = of_logits("distillation", divergence=divergence, temperature=2.0)
        cool, _ = of_logits(
            "distillation", [x / 2 for x in S], ([x / 2 for x in T],), divergence=divergence
        )
        assert hot == pytest.approx(4 * cool, rel=1e-5)
        assert abs(hot - of_logits("distillation", divergence=divergence)[0]) > 1e-2


def test_logits_far_apart_stay_finite():
    far = [0.0, 300.0, -300.0]
    for divergence in ("forward", "reverse", "jensen_shannon"):
        found, slope = of_logits("distillation", [300.0, 0, 0], (far,), divergence=divergence)
        assert np.isfinite(found)
        assert np.isfinite(slope).all()
    js, _ = of_logits("distillation", [300.0, 0, 0], (far,), divergence="jensen_shannon")
    assert js == pytest.approx(np.log(2), rel=1e-5)  # of two distributions that share nothing


NEUTRAL = {
    "distillation": ({"share": 0.0}, "cross_entropy", {}),
    "nd": ({"factor": 0.0, "kd": 0.0}, "cross_entropy", {}),
    "dhkd": ({"alpha": 0.0}, "cross_entropy", {}),
    "dac_kl": ({}, "distillation", {}),
    "block_distillation": ({"block_length": 3}, "distillation", {}),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(NEUTRAL, ("nd", "dhkd")))
def test_neutral_settings_are_the_parent_bit_for_bit(name):
    hyper, parent, its = NEUTRAL[name]
    teachers = {n: (T,) for n in (name, parent)} | {"cross_entropy": ()}
    found = of_logits(name, S, teachers[name], **hyper)
    expected = of_logits(parent, S, teachers[parent], **its)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_plackett_luce_is_cross_entropy_or_the_likelihood_of_the_order():
    s = jnp.asarray([[[0.3, -1.0, 2.0, 0.7]]])
    none, first = jnp.full((1, 1), -1e30), jnp.asarray([[[1.0, 0, 0, 0]]])
    cross_entropy = float(-jax.nn.log_softmax(s)[0, 0, 0])
    assert plackett_luce(s, none, first)[0, 0] == pytest.approx(cross_entropy, rel=1e-6)
    order = sum(float(-jax.nn.log_softmax(s[0, 0, k:])[0]) for k in range(4))
    assert plackett_luce(s, none, jnp.ones_like(s))[0, 0] == pytest.approx(order, rel=1e-6)
    # A list that ends after two of them has their terms, with all four below the fraction.
    rest = jax.nn.logsumexp(s[..., 2:], -1)
    two = sum(float(-jax.nn.log_softmax(s[0, 0, k:])[0]) for k in range(2))
    assert plackett_luce(s[..., :2], rest, jnp.ones((1, 1, 2)))[0, 0] == pytest.approx(
        two, rel=1e-6
    )
    shifted = plackett_luce(s + 5, none, first)
    np.testing.assert_allclose(shifted, plackett_luce(s, none, first), rtol=1e-5)


def test_binary_kl_norm_is_symmetric_and_zero_where_both_are_equal():
    terms = binary_kl_norm(2.0).terms
    s, t = jnp.asarray(S), jnp.asarray(T)
    np.testing.assert_array_equal(terms(s, t), terms(t, s))
    np.testing.assert_array_equal(terms(s, s), 0)
    x = Prediction(s[None, None], jnp.eye(3), products())
    whole = added_up(
        binary_kl_norm(2.0), x, Teacher(t[None, None], jnp.eye(3), products()), 2, None
    )
    assert whole[0, 0] == pytest.approx(float(terms(s, t).sum()), rel=1e-6)


def test_an_aligned_gradient_does_not_work_against_cross_entropy():
    seen = set()
    for teacher in ([1.0, 3.0, 0.0], [9.0, 0.0, 0.0]):
        _, of_nll = of_logits("dhkd", S, (teacher,), alpha=0.0)
        _, of_teacher = of_logits("dhkd", S, (teacher,), gamma=0.0)
        product = of_nll @ of_teacher
        kept = of_teacher - min(product, 0) / (of_nll @ of_nll) * of_nll
        _, found = of_logits("dhkd", S, (teacher,), alignment="hidden")
        np.testing.assert_allclose(found, of_nll + kept, rtol=1e-5, atol=1e-6)
        seen.add(bool(product < 0))
    assert seen == {True, False}


def test_self_knowledge_without_its_terms_is_its_weighting_of_cross_entropy_bit_for_bit():
    b = weightings.batch(rows=4, length=8)
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 8, 8), (8, 37)))

    def value(objective, hidden):
        params = objective.loss.init(jax.random.key(0), 37, 8)
        x = Inputs(hidden, head, b["targets"], params, block_size=16)
        stats = training_statistics(objective.loss, x, b["weights"])
        prepared = objective.prepare(stats, {}, b, {}, (), 0)
        return minimise(objective.terms(stats, {}, b, prepared))[0]

    of = [
        jax.jit(jax.value_and_grad(lambda h, o=o: value(o, h)))(hidden)
        for o in (
            OBJECTIVES["self_knowledge"](beta=0.0, mu=0.0),
            weighted(weighting=uskd()),
            OBJECTIVES["self_knowledge"](beta=0.1, mu=0.0),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, of[0], of[1])
    assert abs(of[2][0] - of[0][0]) > 1e-2


LARGE = {
    "distillation": {"share": 0.5},
    "distillation js": {"divergence": "jensen_shannon", "temperature": 2.0},
    "nkd": {"temperature": 2.0},
    "pld": {},
    "dhkd": {"alignment": "hidden"},
    "nd": {},
    "align_distil": {},
}
VOCABULARY, TOKENS, WIDTH = 131_072, (4, 256), 16


def temporaries(loss, block_size, dense_loss=None):
    """Bytes of the compiled value and gradients; nothing is run."""
    shape = jax.ShapeDtypeStruct
    hidden, head = shape((*TOKENS, WIDTH), jnp.float32), shape((WIDTH, VOCABULARY), jnp.float32)
    params = jax.eval_shape(lambda: loss.init(jax.random.key(0), VOCABULARY, WIDTH))

    def f(hidden, head, params, theirs):
        targets = jnp.zeros(TOKENS, jnp.int32)
        teachers = {n: Teacher(h, w, products()) for n, (h, w) in theirs.items()}
        x = Inputs(hidden, head, targets, params, block_size=block_size, teachers=teachers)
        if dense_loss:
            return dense_loss(x)
        return training_statistics(loss, x, jnp.ones(TOKENS)).loss.sum()

    theirs = {name: (hidden, head) for name in loss.teachers}
    compiled = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(hidden, head, params, theirs)
    return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def of_dense():
    def forward(x):
        ((h, w, _),) = x.teachers.values()
        log_p, log_q = jax.nn.log_softmax(x.hidden @ x.head), jax.nn.log_softmax(h @ w)
        return jnp.sum(jnp.exp(lax.stop_gradient(log_q)) * (lax.stop_gradient(log_q) - log_p))

    return temporaries(LOSSES["distillation"](), 0, forward)


@pytest.mark.parametrize("case", tiny.mostly_slow(LARGE, ("distillation", "nkd", "dhkd")))
def test_blocks_take_a_thirtieth_of_the_memory_of_all_logits(case, of_dense):
    """At a vocabulary of 131,072, forward and backward, against the forward divergence alone."""
    found = temporaries(LOSSES[case.split()[0]](**LARGE[case]), 1024)
    assert of_dense > 4 * VOCABULARY * 4 * 256  # The test sees arrays of all logits.
    assert found < of_dense / 30
