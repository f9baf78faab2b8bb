"""Every distillation is the dense one, with its gradients, in blocks and at once."""

import functools

import dense_distillation as dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives import OBJECTIVES
from objectives.distillation import DISTILLATION
from objectives.losses import LOSSES, Inputs, Teacher, training_statistics
from objectives.terms import masked_sum
from objectives.vocabulary import products

V, D, N = 23, 4, 5
SECOND = {"dhkd": "head", "self_knowledge": "weak"}
CASES = {
    "distillation forward": {"share": 0.7, "temperature": 2.0},
    "distillation reverse": {"divergence": "reverse", "temperature": 0.7},
    "distillation js": {"divergence": "jensen_shannon", "mixing": 0.3, "temperature": 1.5},
    "nkd": {"temperature": 1.5},
    "pld": {"top": 6},
    "pld whole": {"top": 100},
    "dhkd": {"gamma": 0.5, "alpha": 0.2},
    "dhkd binary": {"divergence": "binary_kl"},
    "nd": {"kd": 0.5, "temperature": 2.0},
    "dac_kl": {"lower": 0.01, "upper": 0.3},
    "align_distil": {"beta2": 1.0, "temperature": 1.5},
    "align_distil mixed": {"beta2": 0.3, "adaptive": False},
    "self_knowledge": {"top": 9, "mu": 0.1},
    "self_knowledge released": {"rank": "released"},
}


def make(name, **hyper):
    """The loss of a method, or of the objective."""
    return OBJECTIVES[name](**hyper).loss if name in OBJECTIVES else LOSSES[name](**hyper)


def arrays(seed=0):
    """hidden [1, N, D], head, targets, teachers' hidden states and heads, a second head."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    teachers = [(normal(N, D) * 1.5, normal(D, V)) for _ in range(2)]
    return normal(N, D), normal(D, V), rng.integers(0, V, N), teachers, normal(D, V)


def run(name, block_size, hyper):
    """The jitted loss: ((value, statistics), gradients in hidden, head and second head)."""
    method = name.split()[0]
    loss = make(method, **hyper)

    def f(hidden, head, second, teachers, targets, weights, data):
        named = {
            n: Teacher(h[None], w, products())
            for n, (h, w) in zip(loss.teachers, teachers, strict=False)
        }
        params = {SECOND[method]: second} if method in SECOND else ()
        x = Inputs(hidden[None], head, targets[None], params, block_size=block_size, teachers=named)
        stats = training_statistics(loss, x, data[None])
        return masked_sum(weights[None], stats.loss), stats

    return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))


def float32(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32), tree
    )


@functools.cache
def expected(name):
    """The weighted sum of the dense losses of all tokens but the third, and its gradients."""
    hidden, head, y, teachers, second = arrays()
    method, state = getattr(dense, name.split()[0]), {}
    kept = np.array([1.0, 0.5, 0.0, 2.0, 1.5])

    def value(hidden, head, second):
        found = dense.losses(
            method,
            hidden,
            head,
            y,
            teachers,
            second,
            state if "self" in name else None,
            **CASES[name],
        )
        return float(kept @ found)

    return value(hidden, head, second), dense.gradients(value, hidden, head, second), kept


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max() + 1e-6
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


@pytest.mark.parametrize("block_size", tiny.mostly_slow([7, 0], (7,)))
@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(CASES, ("distillation js", "nkd", "pld", "dhkd", "nd", "self_knowledge")),
)
def test_value_and_gradients_are_dense_and_what_has_no_weight_passes_nothing(name, block_size):
    """The third token is left out by the data, or by a weighting, and may then hold anything."""
    value, slopes, kept = expected(name)
    compute = run(name, block_size, CASES[name])
    hidden, head, y, teachers, second = float32(arrays())
    weights, ones = jnp.asarray(kept, jnp.float32), jnp.ones(N)
    for broken in ("nothing", "student", "teacher", "padding"):
        states, theirs, targets, data = hidden, teachers, y, ones
        if broken in ("student", "padding"):
            states = hidden.at[2].set(jnp.nan)
        if broken in ("teacher", "padding"):
            theirs = [(h.at[2].set(jnp.nan), w) for h, w in teachers]
        if broken == "padding":
            targets, data = y.at[2].set(-100), ones.at[2].set(0)
        (found, stats), grads = compute(states, head, second, theirs, targets, weights, data)
        close((found, grads), (value, slopes))
        assert not np.any(grads[0][2])
        if broken in ("student", "teacher") and (
            broken == "student" or make(name.split()[0]).teachers
        ):
            assert np.isnan(stats.loss[0, 2])  # It is not hidden.
        if broken != "padding":
            assert np.isfinite(np.delete(np.asarray(stats.loss), 2)).all()
    # Negative control: cross-entropy has another gradient.
    of_nll = dense.gradients(
        lambda h: float(kept @ dense.losses(dense.nll, h, arrays()[1], arrays()[2], [])),
        arrays()[0],
    )[0]
    with pytest.raises(AssertionError):
        close(of_nll, slopes[0], 1e-2)


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(["distillation js", "pld", "dhkd", "align_distil"], ("distillation js",)),
)
def test_blocks_of_every_size_give_the_same(name):
    arguments = float32(arrays())
    hidden, head, y, teachers, second = arguments
    of = [
        run(name, size, CASES[name])(hidden, head, second, teachers, y, jnp.ones(N), jnp.ones(N))
        for size in (1, 11, V, 64)
    ]
    for other in of[1:]:
        close((other[0][0], other[1]), (of[0][0][0], of[0][1]))


EQUAL = {
    "distillation forward": {},
    "distillation reverse": {"divergence": "reverse"},
    "distillation js": {"divergence": "jensen_shannon", "mixing": 0.3},
    "distillation hot": {"divergence": "jensen_shannon", "temperature": 1.7},
    "dac_kl": {},
    "block_distillation": {},
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    hidden, head, y, _, second = float32(arrays())
    ones = jnp.ones(N)
    compute = run(name, 7, EQUAL[name])
    (found, stats), grads = compute(hidden, head, second, [(hidden, head)], y, ones, ones)
    # Not to the bit: how the two passes are fused is up to the compiler.
    np.testing.assert_allclose(found, 0, atol=1e-6)
    assert all(np.max(np.abs(g)) < 1e-6 for g in grads[:2])
    np.testing.assert_allclose(stats.teacher_divergence, 0, atol=1e-6)
    np.testing.assert_array_equal(stats.teacher_agreement, 1)
    # Negative control: a teacher that is no shift away.
    (found, _), grads = compute(hidden, head, second, [(hidden, 1.01 * head)], y, ones, ones)
    assert found > 1e-5
    assert all(np.max(np.abs(g)) > 1e-4 for g in grads[:2])


def test_the_reports_are_of_the_logits_as_they_are():
    """At whatever temperature, divergence and without target the loss is computed."""
    hidden, head, y, teachers, second = float32(arrays())
    # Of two tokens the teacher is the student, so that both outcomes are there.
    teachers = [(hidden.at[2:].set(-hidden[2:]), head)]
    z, u = (np.asarray(h, np.float64) @ np.asarray(w) for h, w in ((hidden, head), teachers[0]))
    for name in ("distillation js", "nkd", "nd"):
        compute = run(name, 7, CASES[name])
        (_, stats), _ = compute(hidden, head, second, teachers, y, jnp.ones(N), jnp.ones(N))
        apart = dense.forward(dense.log_softmax(z), dense.log_softmax(u))
        np.testing.assert_allclose(stats.teacher_divergence[0], apart, rtol=1e-5)
        same = z.argmax(-1) == u.argmax(-1)
        assert set(same) == {True, False}
        np.testing.assert_array_equal(stats.teacher_agreement[0], same)
        log_p = dense.log_softmax(z)
        np.testing.assert_allclose(stats.entropy[0], -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5)


BAD = {
    "distillation": [
        ({"divergence": "forwards"}, "divergence='forwards' is not one of: forward, reverse"),
        ({"mixing": 1.0}, "mixing=1.0 must be below 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"share": 1.5}, "share=1.5 must be at least 0 and at most 1"),
    ],
    "nkd": [({"gamma": -1.0}, "gamma=-1.0 must be at least 0")],
    "pld": [({"top": 0}, "top=0 must be at least 1")],
    "dhkd": [({"alignment": "yes"}, "alignment='yes' is not one of: none, hidden")],
    "nd": [({"kd": -1.0}, "kd=-1.0 must be at least 0")],
    "dac_kl": [({"lower": 0.5, "upper": 0.5}, "upper=0.5 must be above 0.5 and at most 1")],
    "align_distil": [({"beta2": 0.0}, "beta2=0.0 must be above 0")],
    "top_k_distillation": [({"share": 1.5}, "share=1.5 must be at least 0 and at most 1")],
    "uld": [({"coefficient": -1.0}, "coefficient=-1.0 must be at least 0")],
}


def test_bad_hyper_parameters_are_refused():
    assert set(BAD) == set(DISTILLATION)
    for name, cases in BAD.items():
        for hyper, message in cases:
            with pytest.raises(ValueError, match=message):
                LOSSES[name](**hyper)
    with pytest.raises(ValueError, match="rank='other' is not one of: probabilities, released"):
        OBJECTIVES["self_knowledge"](rank="other")
