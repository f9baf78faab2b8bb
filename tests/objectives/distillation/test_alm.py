"""Approximate likelihood matching: toy values, NumPy in float64, and which chunks count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.model.trained import Trained
from lm.training.gradients import make_gradients
from objectives.cross_entropy import TokenStatistics
from objectives.distillation.alm import DIFFERENCES, alm, chunks, log1mexp
from objectives.losses import CROSS_ENTROPY, Inputs, training_statistics

ROWS, LENGTH = 4, 16
FIRST = jnp.zeros((), jnp.int32)


def batch(rows=ROWS, length=LENGTH, seed=0):
    """Rows of two segments, the teacher's chunks of one to four tokens, all of their lengths."""
    rng = np.random.default_rng(seed)
    b = tiny.batch(rows, length, seed)
    ends = rng.random((rows, length)) < 0.5
    ends[:, -1] = True
    ends[:, :-1] |= np.diff(np.asarray(b["segment_ids"])) != 0
    teacher = np.where(ends, -rng.uniform(0.1, 9.0, (rows, length)), np.nan)
    b["weights"] = jnp.where(rng.random((rows, length)) > 0.1, 1.0 + (b["weights"] > 1), 0.0)
    # The second document of the first row is one that goes on.
    goes_on = b["sample_positions"] + 5 * (b["segment_ids"] == 2)
    b["sample_positions"] = b["sample_positions"].at[0].set(goes_on[0])
    return b | {"chunk_log_probability": jnp.asarray(teacher, jnp.float32)}


def statistics(nll):
    return TokenStatistics(nll, nll, nll, -nll)


def value(objective, b, nll):
    """(value of "loss", all terms and metrics) for given losses of the tokens."""
    references = {"chunk_log_probability": b["chunk_log_probability"]}
    prepared = objective.prepare(None, {}, b, references, (), FIRST)
    terms = objective.terms(statistics(nll), {}, b, prepared)
    loss = terms["loss"].sum / jnp.where(terms["loss"].denominator, terms["loss"].denominator, 1.0)
    return loss, (terms, prepared.metrics)


def dense_chunks(b):
    """[(row, first token, last token, weight)] of those that count, found one by one."""
    found = []
    b = {name: np.asarray(x) for name, x in b.items()}
    for row in range(len(b["weights"])):
        start, whole = 0, True
        for i in range(b["weights"].shape[1]):
            new = i == 0 or b["segment_ids"][row, i] != b["segment_ids"][row, i - 1]
            if new:
                start, whole = i, b["sample_positions"][row, i] == 0
            if np.isnan(b["chunk_log_probability"][row, i]):
                continue
            weights = b["weights"][row, start : i + 1]
            if whole and weights.all():
                found.append((row, start, i, weights.mean()))
            start, whole = i + 1, True
    return found


def numpy_difference(name, teacher, student, temperature):
    """In float64 as the sheet of the method writes it."""
    a, b = teacher / temperature - 1e-6, student / temperature - 1e-6
    p, q = np.exp(a), np.exp(b)
    r = (teacher - student) / temperature
    return {
        "binary_kl": -(p * np.log(q) + (1 - p) * np.log(1 - q)),
        "reverse_binary_kl": q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)),
        "temp_limit": (teacher - student)
        + (teacher - 1e-6) * np.log((student - 1e-6) / (teacher - 1e-6)),
        "abs": abs(teacher - student),
        "k2": r**2 / 2,
        "k3": np.exp(r) - 1 - r,
    }[name]


@pytest.mark.parametrize("name", tiny.mostly_slow(DIFFERENCES, ("binary_kl", "k3", "abs")))
@pytest.mark.parametrize("temperature", tiny.mostly_slow([1.0, 100.0], (1.0,)))
def test_the_mean_over_chunks_is_that_of_a_loop(name, temperature):
    b = batch()
    nll = jnp.asarray(np.random.default_rng(5).uniform(0.0, 5.0, (ROWS, LENGTH)), jnp.float32)
    found = dense_chunks(b)
    assert len(found) > 10
    assert len({last - first for _, first, last, _ in found}) > 2
    objective = alm(temperature, name)

    def expected(nll):
        losses = [
            weight
            * numpy_difference(
                name,
                np.float64(b["chunk_log_probability"][row, last]),
                -np.float64(nll[row, first : last + 1].sum()),
                temperature,
            )
            for row, first, last, weight in found
        ]
        return sum(losses) / sum(weight for *_, weight in found)

    dirty = jnp.where(b["weights"] == 0, jnp.nan, nll)
    run = jax.jit(jax.value_and_grad(lambda x: value(objective, b, x), has_aux=True))
    (loss, (_, metrics)), gradient = run(dirty)
    exact = np.asarray(nll, np.float64)
    np.testing.assert_allclose(loss, expected(exact), rtol=2e-5)
    assert metrics["chunks"] == len(found)
    assert np.isfinite(gradient).all()
    in_chunks = np.zeros((ROWS, LENGTH), bool)
    for row, first, last, _ in found:
        in_chunks[row, first : last + 1] = True
    assert not gradient[~in_chunks].any()
    step = np.random.default_rng(6).standard_normal(exact.shape) * 1e-5
    slope = (expected(exact + step) - expected(exact - step)) / 2
    np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=2e-3)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.713558), (100.0, 0.04155)])
def test_toy_values(temperature, expected):
    found = DIFFERENCES["binary_kl"](jnp.log(0.5), jnp.log(0.4), temperature)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", tiny.mostly_slow(DIFFERENCES, ("binary_kl", "k3")))
def test_the_least_value_is_where_both_are_equal(name):
    """Zero gradient there, but of an absolute value; more to both sides."""
    for teacher in (-0.3, -5.0, -60.0):
        f = jax.jit(lambda s, t=teacher: DIFFERENCES[name](jnp.float32(t), s, 10.0))
        students = teacher * jnp.asarray([0.5, 0.9, 1.0, 1.1, 2.0])
        values = np.asarray([f(s) for s in students])
        assert (np.diff(values)[:2] < 0).all()
        assert (np.diff(values)[2:] > 0).all()
        slopes = [jax.grad(f)(s) for s in (students[1], jnp.float32(teacher))]
        if name != "abs":
            assert abs(slopes[1]) < 1e-3 * abs(slopes[0])


def test_the_limit_is_that_of_high_temperatures():
    teacher, student = np.float64(-3.0), np.float64(-4.5)
    limit = float(DIFFERENCES["temp_limit"](jnp.float32(teacher), jnp.float32(student), 1.0))
    for temperature in (1e4, 1e5):
        p, q = np.exp(teacher / temperature), np.exp(student / temperature)
        divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        assert limit == pytest.approx(temperature * divergence, rel=3 / temperature + 1e-5)


def test_log1mexp_is_exact_at_both_ends():
    x = np.asarray([-1e-6, -1e-3, -0.5, -np.log(2), -1.0, -20.0, -200.0])
    found, slope = jax.vmap(jax.value_and_grad(log1mexp))(jnp.asarray(x, jnp.float32))
    x = np.float32(x).astype(np.float64)
    np.testing.assert_allclose(found, np.log1p(-np.exp(x)) * (x < -1e-9), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(slope, -np.exp(x) / -np.expm1(x), rtol=1e-5, atol=1e-30)


def test_padding_and_what_is_cut_is_no_chunk():
    """Stored values of the padding are 0, and of a document that goes on the first chunk drops."""
    nan = jnp.nan
    b = {
        "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0]]),
        "weights": jnp.asarray([[1.0, 1, 1, 1, 1, 3, 0, 0]]),
        "sample_positions": jnp.asarray([[9, 10, 11, 0, 1, 2, 0, 0]]),
    }
    teacher = jnp.asarray([[nan, -1, -2, nan, nan, -3, 0, 0]])
    begins, weights, tokens = jax.jit(chunks)(b, teacher)
    np.testing.assert_array_equal(begins[0], [1, 0, 1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(weights[0], [0, 0, 1, 0, 0, 5 / 3, 0, 0])
    np.testing.assert_array_equal(tokens[0], [1, 2, 1, 1, 2, 3, 1, 1])


def test_a_batch_without_a_chunk_is_nothing():
    b = batch()
    b["chunk_log_probability"] = jnp.full((ROWS, LENGTH), jnp.nan)
    run = jax.jit(jax.grad(lambda x: value(alm(), b, x), has_aux=True))
    gradient, (terms, metrics) = run(jnp.ones((ROWS, LENGTH)))
    assert not gradient.any()
    assert terms["loss"].sum == 0
    assert metrics["weight_sum"] == 0  # The step is skipped and counted.


def bigram_statistics(trained, b, teacher=None):
    hidden, head = trained.params["embedding"][b["tokens"]], trained.params["head"]
    hidden = hidden + b["poison"][..., None]
    return training_statistics(CROSS_ENTROPY, Inputs(hidden, head, b["targets"]), b["weights"]), {}


def test_micro_batches_padding_and_scale_change_nothing():
    rng = np.random.default_rng(2)
    params = {
        "embedding": jnp.asarray(rng.standard_normal((tiny.VOCAB, 8)), jnp.float32),
        "head": jnp.asarray(rng.standard_normal((8, tiny.VOCAB)), jnp.float32),
    }
    b = batch(8) | {"poison": jnp.zeros((8, LENGTH))}

    @functools.partial(jax.jit, static_argnums=1)
    def run(b, accumulation=1):
        compute = make_gradients(bigram_statistics, alm(cross_entropy=0.5), accumulation)
        return compute(Trained(params), b, (), FIRST)[:2]

    grads, metrics = run(b)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    wider = {
        name: jnp.pad(
            x, ((0, 4), (0, 3)), constant_values=jnp.nan if name == "poison" else 0
        )
        for name, x in b.items()
    }  # fmt: skip
    for other, scale in ((run(wider, 4), 1), (run({**b, "weights": 7 * b["weights"]}), 7)):
        for x, y in zip(jax.tree.leaves(other[0]), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)
        for name, x in metrics.items():
            factor = scale if name == "weight_sum" else 1
            np.testing.assert_allclose(other[1][name], factor * x, rtol=1e-5)
    # Negative control: a mean of the means of micro-batches is another gradient.
    parts = [run({k: x[i::4] for k, x in b.items()})[0] for i in range(4)]
    means = jax.tree.map(lambda *g: sum(g) / 4, *parts)
    apart = [
        np.abs(x - y).max()
        for x, y in zip(jax.tree.leaves(means), jax.tree.leaves(grads), strict=True)
    ]
    assert max(apart) > 1e-4


@pytest.mark.slow
def test_a_run_on_a_mesh_is_that_on_one_device():
    batches = [batch(8, seed=i) for i in range(2)]
    options = {
        "objective__name": "alm",
        "objective__alm__temperature": 1.0,
        "objective__references__chunk_log_probability": "stored",
    }
    alone, _ = tiny.steps(batches, mesh__data=1, **options)
    spread, _ = tiny.steps(
        batches, 8, mesh__data=2, mesh__tensor=2, mesh__sequence=2, train__accumulation=2, **options
    )
    for one, other in zip(alone, spread, strict=True):
        assert one["chunks"] > 20
        assert one["skipped_steps"] == 0
        for name in ("loss", "nll", "grad_norm", "chunks", "chunk_tokens"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature=0.0 must be above 0"),
        ({"difference": "kl"}, r"^difference='kl' is not one of: binary_kl, "),
        ({"cross_entropy": -1.0}, r"^cross_entropy=-1.0 must be at least 0"),
    ],
)
def test_bad_hyper_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        alm(**options)
