"""Each weighting against the numbers of its paper or code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.cross_entropy import TokenStatistics
from objectives.losses import CROSS_ENTROPY
from objectives.terms import minimise
from objectives.weighted import denominators, loss_term
from objectives.weighting import WEIGHTINGS, normalise
from objectives.weighting.critical_token import contrast_probability
from objectives.weighting.fait import error_mask
from objectives.weighting.q_tuning import choose_samples, smoothed_perplexity
from objectives.weighting.samples import find_samples

P_TOY = [0.9, 0.5, 0.2, 0.05]
FIRST = jnp.zeros((), jnp.int32)
SIGNED = [WEIGHTINGS[name] for name in ("sat_imp", "sim_sat", "sim_imp", "wga")]


def array(*values):
    """One row."""
    return jnp.asarray([values], jnp.float32)


def statistics(nll, entropy=None):
    nll = jnp.asarray(nll, jnp.float32)
    entropy = jnp.zeros_like(nll) if entropy is None else jnp.asarray(entropy, jnp.float32)
    return TokenStatistics(nll, jnp.zeros_like(nll), entropy, -nll)


def dense_statistics(logits, targets):
    log_p = jax.nn.log_softmax(logits)
    at_target = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return TokenStatistics(-at_target, jax.nn.logsumexp(logits, -1), entropy, at_target)


TOY = statistics(-np.log([P_TOY]))


def plain(shape, **more):
    """Every row is a sample."""
    ones = jnp.ones(shape, jnp.int32)
    samples = jnp.arange(shape[0], dtype=jnp.int32)[:, None] * ones
    return {
        "weights": jnp.ones(shape, jnp.float32),
        "segment_ids": ones,
        "sample_ids": samples,
        "sample_positions": jnp.arange(shape[1], dtype=jnp.int32) * ones,
    } | more


def weigh(weighting, stats, batch=None, state=None, step=FIRST, **references):
    batch = plain(stats.nll.shape) if batch is None else batch
    state = weighting.init() if state is None else state
    return weighting.weigh(stats, batch, references, state, step)


def loss_of(weighting, stats, batch=None, **references):
    batch = plain(stats.nll.shape) if batch is None else batch
    weights, _, _ = weigh(weighting, stats, batch, **references)
    return weighted_mean(weighting, stats, weights, batch)


def weighted_mean(weighting, stats, weights, batch):
    totals = denominators(weights, batch["weights"], weighting.normaliser)
    return minimise({"loss": loss_term(CROSS_ENTROPY, stats, weights, totals)})[0]


def near(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual).squeeze(), expected, atol=tolerance)


def test_rho1_toy():
    reference = {"reference_nll": array(0.2, 0.3, 0.5, 2.5)}
    rho1 = WEIGHTINGS["rho1"](keep=0.5)
    near(weigh(rho1, TOY, **reference)[0], [0, 0, 1, 1])
    near(loss_of(rho1, TOY, **reference), 2.302585)
    near(loss_of(WEIGHTINGS["rho1"](keep=1.0), TOY, **reference), 1.350919)


def test_rho1_chooses_over_the_batch_and_ss_token_in_each_sample():
    stats = statistics([[5.0, 6.0], [1.0, 2.0]])
    zero = jnp.zeros((2, 2))
    rho1 = WEIGHTINGS["rho1"](keep=0.5)
    near(weigh(rho1, stats, reference_nll=zero)[0], [[1, 1], [0, 0]])
    ss_token = WEIGHTINGS["ss_token"](keep=0.5, gamma=1.0)
    near(weigh(ss_token, stats, history_nll=zero)[0], [[1, 0], [1, 0]])


def test_ss_token_toy():
    given = {
        "history_nll": array(0.3, 0.9, 1.4, 3.2),
        "attention_to": array(0.1, 0.4, 0.3, 0.2),
    }
    near(loss_of(WEIGHTINGS["ss_token"](attention_row="predictor"), TOY, **given), 1.264747)
    # The rows of the labels are one later: the same numbers, moved there.
    moved = given | {"attention_to": array(9.0, 0.1, 0.4, 0.3)}
    weights, _, _ = weigh(WEIGHTINGS["ss_token"](keep=0.5, gamma=0.0), TOY, **moved)
    near(weights, [0, 1, 1, 1])  # 0.3 is its own and the one before: a tie, both are kept


@pytest.mark.parametrize(("alpha", "loss"), [(1.0, 1.910896), (2.0, 2.168116), (0.0, 1.350919)])
def test_prior_toy(alpha, loss):
    prior = WEIGHTINGS["prior"](alpha=alpha)
    near(loss_of(prior, TOY, prior_nll=TOY.nll), loss)
    if alpha == 1:
        expected = [0.170213, 0.851064, 1.361702, 1.617021]
        near(weigh(prior, TOY, prior_nll=TOY.nll)[0], expected)
    near(loss_of(prior, TOY, prior_nll=jnp.full((1, 4), 0.7)), 1.350919)


def test_fait():
    np.testing.assert_array_equal(error_mask("abcd", "axcd"), [False, True, False, False])
    given = {"error_mask": array(0, 1, 1, 0), "faulty_log_probability": jnp.full((1, 4), -1.0)}
    correct = np.log([0.5, 0.2]).mean()
    inside = 1 + 3 / (1 + np.exp(1 + correct))
    near(weigh(WEIGHTINGS["fait"](strength=3.0), TOY, **given)[0], [1, inside, inside, 1])


@pytest.mark.parametrize(
    ("weighting", "loss"),
    [
        (WEIGHTINGS["sat_imp"](5.0, 1.0), -0.004366),
        (WEIGHTINGS["sat_imp"](5.0, 0.1), -0.017533),
        (WEIGHTINGS["sat_imp"](0.0, 0.0), -1.350919),
        (WEIGHTINGS["wga"](), -0.228268),
        (WEIGHTINGS["sim_sat"](1.0), -0.228268),
        (WEIGHTINGS["sat_imp"](0.0, 2.0), -np.mean([0.001054, 0.173287, 1.03004, 2.703648])),
        (WEIGHTINGS["sim_imp"](2.0), -np.mean([0.001054, 0.173287, 1.03004, 2.703648])),
        (normalise(WEIGHTINGS["dft"](), "all"), 0.228268),
        (normalise(WEIGHTINGS["focal"](), "all"), np.mean([0.001054, 0.173287, 1.03004, 2.703648])),
    ],
)
def test_powers_of_the_probability_toy(weighting, loss):
    near(loss_of(weighting, TOY), loss)


def test_sat_imp_toy_weights():
    weights, _, _ = weigh(WEIGHTINGS["sat_imp"](5.0, 1.0, ascend=False), TOY)
    near(weights, [0.059049, 0.015625, 0.000256, 0], 1e-6)


def test_uskd_toy():
    stats = statistics(-np.log([[0.6, 0.8]]))
    near(weigh(WEIGHTINGS["uskd"](), stats)[0], [0.86, 1.14])


def test_frequency_equity_toy():
    weights, _, _ = weigh(WEIGHTINGS["frequency_equity"](), TOY, likelihood=array(0, 1, 0.5, 0.5))
    near(weights, [1, 0.5, 0.515625, 0.515625])


def test_critical_token_toy():
    positive, negative = jnp.asarray([2.0, 0.0]), jnp.asarray([0.0, 2.0])
    p = jnp.stack([contrast_probability(positive, negative, jnp.asarray(i)) for i in (0, 1)])
    near(p, [0.997527, 0.002473])
    stats = statistics([[1.0, 1.0]])
    weights, _, _ = weigh(WEIGHTINGS["critical_token"](), stats, contrast_probability=p[None])
    near(weights, [0.002473, 0.997527])


def test_block_sensitive():
    full = array(0.105361, 0.193147, 1.609438, 1.995732)
    weights, _, _ = weigh(WEIGHTINGS["block_sensitive"](strength=2.0), TOY, full_nll=full)
    near(weights, [1, 2, 1, 3])


@pytest.mark.parametrize(
    ("strategy", "temperature", "expected"),
    [
        ("lin_upper", 1.0, [0.119271, 0.232307, 0.324211, 0.324211]),
        ("lin_upper", 0.4, [0.032616, 0.172687, 0.397348, 0.397348]),
        ("lin_upper", 100.0, [0.248337, 0.249998, 0.250833, 0.250833]),
        ("quadratic", 1.0, [0.14567, 0.35433, 0.35433, 0.14567]),
        ("quadratic", 0.4, [0.048886, 0.451114, 0.451114, 0.048886]),
        ("extremes", 1.0, [0.330378, 0.169622, 0.169622, 0.330378]),
        ("extremes", 0.4, [0.420565, 0.079435, 0.079435, 0.420565]),
    ],
)
def test_dynamic_toy(strategy, temperature, expected):
    stats = statistics([[1.0], [2.0], [3.0], [4.0]])
    dynamic = WEIGHTINGS["dynamic"](strategy=strategy, temperature=temperature)
    near(weigh(dynamic, stats)[0] / 4, expected)
    near(weigh(dynamic, statistics(3 * stats.nll + 5))[0] / 4, expected)
    near(loss_of(normalise(dynamic, "sequence"), stats), np.dot(expected, [1, 2, 3, 4]), 1e-5)


def test_dynamic_anneals():
    stats = statistics([[1.0], [2.0], [3.0], [4.0]])
    options = {"temperature": 0.5, "burn_in": 2, "anneal_steps": 8, "initial_temperature": 8.0}

    def temperature(step, **more):
        weighting = WEIGHTINGS["dynamic"](**options, **more)
        weights, _, metrics = weigh(weighting, stats, step=jnp.asarray(step))
        constant = WEIGHTINGS["dynamic"](temperature=1 / max(metrics.popitem()[1], 1e-9))
        near(weights, weigh(constant, stats)[0].squeeze())
        return np.log(weights[3, 0] / weights[0, 0]) and 1 / np.log(weights[3, 0] / weights[0, 0])

    assert temperature(1) == 0
    near([temperature(s) for s in (2, 7, 8, 9)], [8, 8, 0.5, 0.5], 1e-4)
    near([temperature(s, anneal="geometric") for s in (4, 8, 20)], [2, 0.5, 0.5], 1e-4)


def test_glow_toy_and_its_table():
    glow = WEIGHTINGS["glow"](samples=4, alpha=1.0, beta=10.0)
    stats = statistics([[1.1, 0.9], [2.0, 2.0], [3.0, 3.0]])
    b = plain((3, 2), sample_ids=jnp.asarray([[2, 2], [0, 0], [3, 3]], jnp.int32))
    weights, table, metrics = weigh(glow, stats, b)
    near(weights, np.ones((3, 2)))
    near(table, [2, -1, 1, 3])
    assert metrics["glow_seen"] == 0
    later = statistics(stats.nll + jnp.asarray([[0.1], [-1.0], [0.0]]))
    weights, table, metrics = weigh(glow, later, b, table)
    near(weights[:, 0], [0.731059, 0.5, 0.5])
    near(table, [1, -1, 1.1, 3])
    assert metrics["glow_seen"] == 1
    neutral = WEIGHTINGS["glow"](samples=4, alpha=2.0, beta=10.0)
    near(weigh(neutral, later, b, table)[0], np.ones((3, 2)))


def test_glow_gathers_a_document_from_all_its_pieces():
    """Against a loop over documents; weights of the data are the weights of the mean."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 6, (5, 7))
    weights = rng.uniform(0.1, 2.0, ids.shape) * (rng.random(ids.shape) > 0.3) * (ids >= 0)
    nll = rng.uniform(0.0, 4.0, ids.shape)
    before = np.array([1.0, -1.0, 2.0, 3.0, 0.5, 1.5, 9.0])
    b = plain(ids.shape, sample_ids=jnp.asarray(ids, jnp.int32)) | {"weights": jnp.asarray(weights)}
    # What is no target may hold anything.
    stats = statistics(np.where(weights, nll, np.nan))
    table = jnp.asarray(before, jnp.float32)
    actual, after, metrics = weigh(WEIGHTINGS["glow"](samples=7, beta=2.0), stats, b, table)
    expected, now, sizes = weights.copy(), before.copy(), []
    for sample in range(6):
        own = (ids == sample) & (weights > 0)
        now[sample] = (weights * nll)[own].sum() / weights[own].sum()
        if before[sample] >= 0:
            gain = 2 * (1 - 1 / (1 + np.exp(-2.0 * (before[sample] - now[sample]))))
            expected[own] *= np.clip(gain, 0.5, 5.0)
            sizes.append(np.clip(gain, 0.5, 5.0))
        else:
            sizes.append(1.0)
    near(actual, expected)
    near(after, now)
    near(metrics["glow_mean_weight"], np.mean(sizes))
    near(metrics["glow_seen"], 5 / 6)
    # Negative control: with rows for samples it would be another weight.
    by_row = {**b, "sample_ids": jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[:, None], (5, 7))}
    with pytest.raises(AssertionError):
        near(weigh(WEIGHTINGS["glow"](samples=7, beta=2.0), stats, by_row, table)[0], expected, 0.1)


def test_glow_refuses_an_unknown_sample_but_not_a_token_without_weight():
    glow = WEIGHTINGS["glow"](samples=4)
    stats = statistics([[1.0], [2.0], [3.0], [5.0], [5.0], [np.nan]])
    b = plain((6, 1), sample_ids=jnp.asarray([4, -1, 1, 1, 9, 2], jnp.int32)[:, None])
    b["weights"] = b["weights"].at[4].set(0.0)
    weights, table, _ = weigh(glow, stats, b)
    near(weights, [np.nan, np.nan, 1, 1, 0, np.nan])
    near(table, [-1, 4, np.nan, -1])
    np.testing.assert_array_equal(weigh(glow, stats, {**b, "weights": 0 * b["weights"]})[0], 0)


def test_q_tuning_toy_score():
    ppl = np.log([[2.0, 10.0, 12.0, 3.0]])
    b = plain((1, 4))
    places = b["sample_positions"]
    samples = find_samples(b)
    fewer = find_samples({**b, "weights": b["weights"].at[0, 1].set(0)})

    def smoothed(ppl, samples, *options):
        return smoothed_perplexity(jnp.asarray(ppl), samples, places, *options)

    near(smoothed(ppl, samples, 0.5), [4, 8.5, 9.25, 5.25])
    near(smoothed(ppl, samples, 0.5, "sum"), [7, 12, 12.5, 9])
    near(smoothed(ppl, samples, 0.0), np.exp(ppl[0]), 1e-4)
    near(smoothed(ppl, fewer, 0.5)[0, 2], 9.75)


def test_q_tuning_quadrants():
    ppl = jnp.asarray([1.0, 9.0, 8.5, 1.5, 5.0, 4.0, 5.5, 4.5])
    entropy = jnp.asarray([9.0, 1.0, 8.6, 1.4, 5.1, 4.4, 4.9, 5.3])
    live = jnp.ones(8, bool)
    (whole, pruned), more = jax.jit(
        lambda: [choose_samples(ppl, entropy, live, share) for share in (0.25, 0.75)]
    )()
    np.testing.assert_array_equal(np.flatnonzero(whole), [0])  # expected, but with doubts
    np.testing.assert_array_equal(np.flatnonzero(pruned), [1])  # unexpected, without doubts
    assert not np.any(more[0] & more[1])
    assert (more[0] | more[1]).sum() == 6
    stats = statistics(
        np.log([[0.5, 1.0, 1.5, 1.0], [1.0, 4.0, 15.0, 16.0]] * 2),
        np.repeat([9, 1, 8, 2], 4).reshape(4, 4),
    )
    weights, lowest = jax.jit(
        lambda: [
            weigh(WEIGHTINGS["q_tuning"](0.5, 0.5, prune=prune), stats)[0]
            for prune in ("highest", "lowest")
        ]
    )()
    near(weights, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    near(lowest[1], [0, 0, 1, 1])
