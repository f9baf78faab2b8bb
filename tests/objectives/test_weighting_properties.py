"""Every weighting against its definition: gradients, neutral settings, broken input, chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings
from test_weighting import (
    FIRST,
    SIGNED,
    TOY,
    dense_statistics,
    loss_of,
    near,
    plain,
    statistics,
    weigh,
    weighted_mean,
)

from objectives.weighting import WEIGHTINGS, chain, normalise, weight_metrics
from objectives.weighting.samples import find_samples, highest_of_samples
from objectives.weighting.selection import highest, share_of


@functools.cache
def toy_statistics():
    return jax.jit(weightings.bigram_statistics)(weightings.bigram(), weightings.batch())


def loss_and_gradient(weighting, b):
    def loss(params, b):
        stats = weightings.bigram_statistics(params, b)
        weights, _, _ = weighting.weigh(stats, b, {}, weightings.state(weighting), FIRST)
        return weighted_mean(weighting, stats, weights, b)

    # The batch is an argument: the compiler adds up a constant one in another order.
    return jax.jit(jax.value_and_grad(loss))(weightings.bigram(), b)


@functools.cache
def cross_entropy():
    return loss_and_gradient(weightings.make("uniform"), weightings.batch())


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(weightings.METHODS, ("uniform", "rho1", "glow", "focal"))
)
def test_neutral_hyper_parameters_are_cross_entropy_bit_for_bit(name):
    """Loss and gradients, after any step."""
    neutral = weightings.make(name, neutral=True)
    actual = loss_and_gradient(neutral, weightings.batch())
    expected = jax.tree.map(jnp.negative, cross_entropy()) if neutral.signed else cross_entropy()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Normalisation is not the business of a weighting: one of them stands for all.
BY = [(name, "all" if WEIGHTINGS[name] in SIGNED else "kept") for name in weightings.METHODS]


@pytest.mark.parametrize(
    ("name", "by"),
    tiny.rows_mostly_slow([*BY, ("dft", "all"), ("dft", "sequence")], range(0, 20, 4)),
)
def test_gradient_is_weight_times_p_minus_y(name, by):
    """d loss / d logits = w (softmax - onehot) / normaliser, where the weight is detached."""
    weighting = normalise(weightings.make(name), by)
    b = weightings.batch(rows=4, length=8)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 37)), jnp.float32)

    def loss(logits):
        stats = dense_statistics(logits, b["targets"])
        weights, _, _ = weighting.weigh(stats, b, {}, weightings.state(weighting), FIRST)
        return weighted_mean(weighting, stats, weights, b), weights

    gradient, weights = jax.jit(jax.grad(loss, has_aux=True))(logits)
    share = weights / (b["weights"].sum() if by == "all" else weights.sum())
    slope = jax.nn.softmax(logits) - jax.nn.one_hot(b["targets"], 37)
    largest = np.abs(gradient - share[..., None] * slope).max()
    assert largest < 1e-6 if weighting.detached else largest > 1e-4
    assert weights.dtype == jnp.float32
    assert not np.any(weights[b["weights"] == 0])
    # Negative control: these hyper-parameters are not neutral.
    even = b["weights"] / b["weights"].sum()
    assert name == "uniform" or np.abs(share - even).max() > 1e-4


@pytest.mark.parametrize("by", ["kept", "sequence"])
def test_negative_weights_are_not_divided_by_their_own_sum(by):
    with pytest.raises(ValueError, match="sign"):
        normalise(WEIGHTINGS["wga"](), by)


def test_focal_gradient_is_that_of_the_focal_loss():
    logits = jnp.asarray([[[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]])
    targets = jnp.zeros((1, 2), jnp.int32)
    b = plain((1, 2))

    def ours(logits, detach):
        stats = dense_statistics(logits, targets)
        weights, _, _ = weigh(WEIGHTINGS["focal"](0.5, detach), stats, b)
        return jnp.sum(weights * stats.nll)

    def definition(logits):
        p = jax.nn.softmax(logits)[..., 0]
        return jnp.sum((1 - p) ** 0.5 * -jnp.log(p))

    expected = jax.grad(definition)(logits)
    near(jax.grad(ours)(logits, False), expected.squeeze(), 1e-6)
    assert np.abs(jax.grad(ours)(logits, True) - expected).max() > 0.05


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        [n for n in weightings.METHODS if n != "uniform"], ("rho1", "glow", "focal", "dynamic")
    ),
)
def test_nan_makes_the_loss_nan_and_an_empty_batch_has_no_weight(name):
    """A NaN of a live token is never a token less; masked tokens may hold anything."""
    weighting = weightings.make(name)
    b, stats = weightings.batch(), toy_statistics()
    live = tuple(np.argwhere(b["weights"])[0])

    @jax.jit
    def run(stats, b):
        weights, _, _ = weighting.weigh(stats, b, {}, weightings.state(weighting), FIRST)
        return weighted_mean(weighting, stats, weights, b), weights.sum()

    assert np.isfinite(run(stats, b)[0])
    for key in weighting.references:
        # The attention to a target stands elsewhere, but in the same row.
        where = live if key != "attention_to" else live[0]
        assert np.isnan(run(stats, {**b, key: b[key].at[where].set(jnp.nan)})[0])
    broken = jax.tree.map(lambda x: x.at[live].set(jnp.nan), stats)
    assert np.isnan(run(broken, b)[0])
    assert run(stats, {**b, "weights": jnp.zeros_like(b["weights"])}) == (0, 0)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("rho1", {"keep": 0.0}, "keep=0.0 must be above 0 and at most 1"),
        ("rho1", {"keep": 1.5}, "keep=1.5"),
        ("rho1", {"keep": float("nan")}, "keep=nan"),
        ("ss_token", {"keep": -1.0}, "keep=-1.0"),
        ("ss_token", {"gamma": 2.0}, "gamma=2.0"),
        ("ss_token", {"attention_row": "query"}, "attention_row='query'"),
        ("prior", {"alpha": -1.0}, "alpha=-1.0"),
        ("dynamic", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("dynamic", {"strategy": "upper"}, "lin_upper"),
        ("glow", {}, "samples=0 must be at least 1"),
        ("q_tuning", {"keep_tokens": 0.0}, "keep_tokens=0.0"),
        ("focal", {"gamma": -1.0}, "gamma=-1.0 must be at least 0"),
    ],
)
def test_bad_hyper_parameters_are_refused(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        WEIGHTINGS[name](**hyper)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="'reference_nll' is missing; given: full_nll"):
        weigh(WEIGHTINGS["rho1"](), TOY, full_nll=TOY.nll)


def test_chain_multiplies():
    b, stats = weightings.batch(), toy_statistics()
    parts = [weightings.make(name) for name in ("dft", "glow", "uniform", "rho1")]
    weighting = chain(*parts)
    table = weightings.state(parts[1])
    weights, new, metrics = weighting.weigh(stats, b, {}, (table,), FIRST)
    live = b["weights"] != 0
    expected = jnp.ones_like(weights)
    for part in parts:
        expected *= part.weigh(stats, b, {}, weightings.state(part), FIRST)[0] / jnp.where(
            live, b["weights"], 1
        )
    near(weights, np.asarray(expected * b["weights"]), 1e-6)
    assert len(new) == len(weighting.init()) == 1
    np.testing.assert_array_equal(new[0], parts[1].weigh(stats, b, {}, table, FIRST)[1])
    assert {"glow_seen"} <= set(metrics)
    assert weighting.uses_statistics
    assert weighting.detached
    assert weighting.batch_keys == ("sample_ids",)
    assert not chain(weightings.make("dft"), weightings.make("focal")).detached
    signed = chain(weightings.make("dft"), weightings.make("wga"))
    assert signed.signed
    assert signed.normaliser == "all"
    with pytest.raises(ValueError, match="at least one"):
        chain()


def test_normalisations():
    nll = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]
    b = plain((2, 4))
    b["weights"] = b["weights"].at[1, 2:].set(0.0)
    weighting = WEIGHTINGS["dft"](exponent=0.1)
    u = np.exp(-0.1 * np.asarray(nll)) * np.asarray(b["weights"])
    by_row = (u * nll).sum(1) / [4, 2]
    expected = {
        "kept": (u * nll).sum() / u.sum(),
        "all": (u * nll).sum() / 6,
        "sequence": by_row.sum() / (u.sum(1) / [4, 2]).sum(),
    }
    assert len({round(x, 2) for x in expected.values()}) == 3
    for by, loss in expected.items():
        near(loss_of(normalise(weighting, by), statistics(nll), b), loss)
    with pytest.raises(ValueError, match="kept, all, sequence"):
        normalise(weighting, "mean")


def test_metrics_of_the_weights():
    data = jnp.asarray([[1.0, 1.0, 2.0, 1.0, 0.0]])
    values = weight_metrics(jnp.asarray([[1.0, 0.0, 2.0, 1.0, 0.0]]), data)
    near(values["kept_share"], 0.75)
    near(values["weight_entropy"], -(0.5 * np.log(0.25) + 0.5 * np.log(0.5)))
    near(values["effective_sample_size"], 16 / 6)
    near(weight_metrics(data[:, :2], data[:, :2])["weight_entropy"], np.log(2))
    empty = weight_metrics(0 * data, 0 * data)
    assert [float(x) for x in empty.values()] == [0, 0, 0]


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("share", tiny.mostly_slow([0.001, 0.1, 0.35, 0.6, 0.999], (0.001, 0.35)))
def test_highest_is_a_sort(share, by_sample):
    rng = np.random.default_rng(0)
    score = (rng.standard_normal((7, 33)) * 10.0 ** rng.integers(-30, 30, (7, 33))).astype("f4")
    mask = rng.random((7, 33)) > 0.3
    mask[3] = False
    ids = rng.integers(0, 9, (7, 33)).astype(np.int32) if by_sample else np.zeros((7, 33), np.int32)

    @jax.jit
    def select(score, mask):
        if not by_sample:
            return highest(score, mask, share)
        batch = {"weights": mask.astype(jnp.float32), "sample_ids": ids}
        return highest_of_samples(find_samples(batch), score, share)

    got = np.asarray(select(score, mask))
    for sample in range(ids.max() + 1):
        s, m, g = (x[ids == sample] for x in (score, mask, got))
        k = -int(-m.sum() * round(share * 1000) // 1000)
        assert g.sum() == k
        if k:
            np.testing.assert_array_equal(g, m & (s >= np.sort(s[m])[-k]))


def test_highest_keeps_ties_and_both_zeros():
    score = jnp.asarray([[0.0, -0.0, 1.0, -1.0, -jnp.inf]])
    samples = find_samples(plain((1, 5)))
    for kept in (highest(score, samples.live_BT, 0.4), highest_of_samples(samples, score, 0.4)):
        np.testing.assert_array_equal(kept, [[True, True, True, False, False]])


@pytest.mark.parametrize("share", [0.1, 0.6, 0.7, 1.0])
def test_share_is_exact_where_float32_is_not(share):
    counts = np.asarray([1, 5, 10, 4096, 16_777_217, 2_000_000_000], np.int32)
    exact = [-(-int(n) * round(share * 10) // 10) for n in counts]
    np.testing.assert_array_equal(jax.vmap(lambda n: share_of(n, share))(counts), exact)
