"""Losses of a stored teacher against the dense computation in NumPy, float64, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives.distillation.ranking import top_tokens
from objectives.distillation.selected import selected_statistics
from objectives.losses import LOSSES, Inputs, Teacher, training_statistics
from objectives.terms import masked_sum
from objectives.vocabulary import products

ROWS, LENGTH, V, D, S = 2, 5, 41, 6, 7


def inputs(entries=S, softcap=0.0, block_size=16, seed=0) -> Inputs:
    rng = np.random.default_rng(seed)
    return Inputs(
        jnp.asarray(rng.standard_normal((ROWS, LENGTH, D)), jnp.float32),
        jnp.asarray(rng.standard_normal((D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (ROWS, LENGTH)), jnp.int32),
        softcap=softcap,
        block_size=block_size,
        stored=tiny.stored_teacher(ROWS, LENGTH, entries, V),
    )


WEIGHTS = np.linspace(0.5, 2.0, ROWS * LENGTH).reshape(ROWS, LENGTH)
WEIGHTS[1, 2] = 0.0


def run(loss, x: Inputs, weights=WEIGHTS):
    """((sum, losses), d sum / d (hidden, head)), jitted."""

    def f(hidden, head):
        found = training_statistics(
            loss, x._replace(hidden=hidden, head=head), jnp.asarray(weights, jnp.float32)
        )
        return masked_sum(jnp.asarray(weights, jnp.float32), found.loss), found.loss

    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x.hidden, x.head)


def dense_log_p(x: Inputs, hidden, head):
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    z = x.softcap * np.tanh(z / x.softcap) if x.softcap else z
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def dense_top_k(x, log_p, rest, share):
    ids, log_q = (np.asarray(x.stored[f"teacher_{name}"]) for name in ("ids", "log_probabilities"))
    q, p = np.exp(log_q.astype(np.float64)), np.exp(np.take_along_axis(log_p, ids, -1))
    if rest:
        q = np.concatenate([q, 1 - q.sum(-1, keepdims=True)], -1)
        p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1)
    else:
        q, p = (one / one.sum(-1, keepdims=True) for one in (q, p))
    nll = -np.take_along_axis(log_p, np.asarray(x.targets)[..., None], -1)[..., 0]
    return share * (q * np.log(q / p)).sum(-1) + (1 - share) * nll


def dense_uld(x, log_p, coefficient, cross_entropy):
    q = np.asarray(x.stored["teacher_sorted"], np.float64)
    p = np.sort(np.exp(log_p), -1)[..., ::-1]
    size = q.shape[-1]
    p = np.pad(p, ((0, 0), (0, 0), (0, max(0, size - V))))[..., :size]
    distance = np.where(np.isnan(q[..., 0]), 0.0, np.abs(np.nan_to_num(q) - p).sum(-1))
    nll = -np.take_along_axis(log_p, np.asarray(x.targets)[..., None], -1)[..., 0]
    return coefficient * distance + cross_entropy * nll


TOP_K, ULD = LOSSES["top_k_distillation"], LOSSES["uld"]
CASES = {
    "rest": (TOP_K(), functools.partial(dense_top_k, rest=True, share=1.0)),
    "share": (TOP_K(share=0.3), functools.partial(dense_top_k, rest=True, share=0.3)),
    "renormalised": (TOP_K(rest=False), functools.partial(dense_top_k, rest=False, share=1.0)),
    "uld": (ULD(2.0, 0.5), functools.partial(dense_uld, coefficient=2.0, cross_entropy=0.5)),
    "distance": (ULD(1.0, 0.0), functools.partial(dense_uld, coefficient=1.0, cross_entropy=0.0)),
}


def total(x, dense, hidden, head):
    return (WEIGHTS * dense(x, dense_log_p(x, hidden, head))).sum()


@pytest.mark.parametrize(
    ("case", "options"),
    tiny.rows_mostly_slow(
        [(case, {}) for case in CASES]
        + [("rest", {"softcap": 1.5}), ("distance", {"softcap": 1.5}), ("rest", {"block_size": 0})]
        + [
            ("distance", {"block_size": 0}),
            ("distance", {"block_size": 3}),
            ("share", {"entries": 1}),
        ],
        (0, 1, 3, 4, 8),
    ),
)
def test_values_and_gradients_are_those_of_numpy(case, options):
    """Finite differences in float64 along random directions; NaN in a token of weight 0."""
    loss, dense = CASES[case]
    x = inputs(**options)
    poisoned = x._replace(
        hidden=x.hidden.at[1, 2].set(jnp.nan),
        targets=x.targets.at[1, 2].set(-100),
        stored={name: a.at[1, 2].set(jnp.asarray(jnp.nan, a.dtype) if a.dtype == jnp.float32
                                     else 9999) for name, a in x.stored.items()},
    )  # fmt: skip
    (value, _), (dhidden, dhead) = run(loss, poisoned)
    hidden, head = (np.asarray(a, np.float64) for a in (x.hidden, x.head))
    np.testing.assert_allclose(value, total(x, dense, hidden, head), rtol=1e-5)
    assert not np.any(dhidden[1, 2])
    rng = np.random.default_rng(1)
    for _ in range(4):
        u, w = rng.standard_normal(hidden.shape), rng.standard_normal(head.shape)
        ends = [total(x, dense, hidden + e * u, head + e * w) for e in (1e-6, -1e-6)]
        slope = np.sum(u * np.asarray(dhidden)) + np.sum(w * np.asarray(dhead))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=2e-4, atol=1e-4)
        # Negative control: a gradient that is one percent longer would show.
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(
                1.01 * slope, (ends[0] - ends[1]) / 2e-6, rtol=2e-4, atol=1e-4
            )


@pytest.mark.parametrize("rest", tiny.mostly_slow([True, False], (True,)))
def test_all_entries_of_the_teacher_are_the_whole_divergence(rest):
    """The limit K = V, against the loss that has the teacher in the step."""
    rng = np.random.default_rng(3)
    hidden, head = rng.standard_normal((ROWS, LENGTH, 3)), rng.standard_normal((3, V))
    teacher = Teacher(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), products())
    log_q, ids = jax.lax.top_k(jax.nn.log_softmax(teacher.hidden @ teacher.head), V)
    stored = {"teacher_ids": ids, "teacher_log_probabilities": log_q}
    x = inputs()._replace(teachers={"teacher": teacher}, stored=stored)
    ones = np.ones((ROWS, LENGTH))
    (value, losses), gradients = run(TOP_K(rest=rest), x, ones)
    (expected, of_whole), wanted = run(LOSSES["distillation"](), x, ones)
    np.testing.assert_allclose(losses, of_whole, atol=2e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # Fewer are less of it: what two outcomes that are joined say of each other is lost.
    fewer = {name: one[..., :S] for name, one in stored.items()}
    less = run(TOP_K(), x._replace(stored=fewer), ones)[0][1]
    assert (np.asarray(less) < np.asarray(of_whole) - 1e-4).all()
    assert (np.asarray(less) > 0).all()


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    x = inputs()
    log_q, ids = jax.lax.top_k(jax.nn.log_softmax(x.hidden @ x.head), S)
    x = x._replace(
        stored={
            "teacher_ids": ids,
            "teacher_log_probabilities": log_q,
            "teacher_sorted": jnp.exp(log_q),
        }
    )
    for loss in (TOP_K(), TOP_K(rest=False), ULD(cross_entropy=0.0)):
        (value, _), _ = run(loss, x)
        assert abs(value) < 2e-5
    assert max(np.abs(g).max() for g in run(TOP_K(), x)[1]) < 1e-5


def test_toy_values():
    """Of one token: two of three entries, and a teacher with more tokens than the student."""
    log_p = np.log([0.5, 0.3, 0.2])
    x = Inputs(
        jnp.asarray(log_p, jnp.float32)[None, None],
        jnp.eye(3),
        jnp.zeros((1, 1), jnp.int32),
        block_size=2,
        stored={
            "teacher_ids": jnp.asarray([[[1, 0]]]),
            "teacher_log_probabilities": jnp.log(jnp.asarray([[[0.6, 0.3]]])),
            "teacher_sorted": jnp.asarray([[[0.4, 0.35, 0.2, 0.05]]]),
        },
    )
    ones = np.ones((1, 1))
    rest = 0.6 * np.log(2) + 0.3 * np.log(0.6) + 0.1 * np.log(0.5)
    assert run(TOP_K(), x, ones)[0][0] == pytest.approx(rest, abs=1e-6)
    alone = 2 / 3 * np.log(2 / 3 / 0.375) + 1 / 3 * np.log(1 / 3 / 0.625)
    assert run(TOP_K(rest=False), x, ones)[0][0] == pytest.approx(alone, abs=1e-6)
    assert run(ULD(), x, ones)[0][0] == pytest.approx(0.1 + 0.05 + 0.0 + 0.05 - log_p[0], abs=1e-6)
    assert run(ULD(0.0), x, ones)[0][0] == pytest.approx(-log_p[0], abs=1e-6)


def test_what_is_left_is_summed_by_itself():
    """Where the student leaves 1e-12 to the rest, 1 - sum has no digit of it."""
    z = jnp.asarray([30.0, 29.0, 1.0, 0.0, -1.0])
    x = Inputs(z[None, None], jnp.eye(5), jnp.zeros((1, 1), jnp.int32), block_size=2)
    _, selected = selected_statistics(x, jnp.asarray([[[0, 1]]]))
    assert selected.rest[0, 0] == pytest.approx(float(jax.nn.logsumexp(z[2:])), abs=1e-5)
    np.testing.assert_array_equal(selected.logits[0, 0], [30.0, 29.0])
    log_q = jnp.log(jnp.asarray([[[0.5, 0.25]]]))
    stored = {"teacher_ids": jnp.asarray([[[0, 1]]]), "teacher_log_probabilities": log_q}
    (value, _), (dhidden, _) = run(TOP_K(), x._replace(stored=stored), np.ones((1, 1)))
    p = np.exp(np.float64(z) - np.log(np.exp(np.float64(z)).sum()))
    expected = 0.5 * np.log(0.5 / p[0]) + 0.25 * np.log(0.25 / p[1])
    expected += 0.25 * np.log(0.25 / p[2:].sum())
    assert value == pytest.approx(expected, rel=1e-6)
    shares = p[2:] / p[2:].sum()
    np.testing.assert_allclose(dhidden[0, 0, 2:], p[2:] - 0.25 * shares, rtol=1e-5)


@pytest.mark.parametrize("bad", tiny.mostly_slow([V, -1], (-1,)))
def test_an_id_outside_of_the_vocabulary_is_nan_and_not_another_token(bad):
    x = inputs()
    ids = x.stored["teacher_ids"].at[0, 0, 0].set(bad)
    losses = run(TOP_K(), x._replace(stored={**x.stored, "teacher_ids": ids}))[0][1]
    assert np.isnan(losses[0, 0])
    assert np.isfinite(losses[0, 1:]).all()


@pytest.mark.parametrize("count", [1, S, V, V + 3])
def test_the_largest_are_those_of_a_sort(count):
    x = inputs(block_size=4)
    found = jax.jit(lambda: top_tokens(lambda w, _: x.hidden @ w, x.head, count, 4)[1])()
    z = np.asarray(x.hidden) @ np.asarray(x.head)
    np.testing.assert_array_equal(found, np.argsort(-z, -1)[..., :count])


def test_no_array_of_all_logits_exists():
    """At 131,072 entries, [B, T, V] float32 would be 128 MiB."""
    vocabulary, tokens, width = 131_072, 256, 16
    shapes = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens, 64), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32),
    )

    def temporaries(loss, block_size):
        def f(hidden, head, targets, ids, q):
            stored = {"teacher_ids": ids, "teacher_log_probabilities": q, "teacher_sorted": q}
            x = Inputs(hidden, head, targets, block_size=block_size, stored=stored)
            return jnp.sum(training_statistics(loss, x, jnp.ones(targets.shape)).loss)

        compiled = jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * tokens * vocabulary
    head = 4 * width * vocabulary
    for loss in (TOP_K(), ULD()):
        assert temporaries(loss, 1024) < 0.2 * whole + 2 * head
    assert temporaries(TOP_K(), 0) > whole  # Negative control.


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"^share=2 must be"):
        TOP_K(share=2)
    with pytest.raises(ValueError, match=r"^coefficient=-1 must be at least 0"):
        ULD(-1)
