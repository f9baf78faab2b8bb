"""Parts of policy gradients: worked numbers and limits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.policy import POLICY, aggregations, clipping, kl, ratios, surrogates, token_weights
from objectives.policy import advantages as of_rewards
from objectives.policy.answers import find_answers
from objectives.policy.entropy import (
    entropy_scale,
    no_scale,
    redistributed,
    relative_entropy,
    temperature_factors,
)
from objectives.policy.policy import token_ids
from objectives.policy.values import gae

SHAPE = 8, cases.LENGTH
# Log ratios of one answer.
TOY = np.array([0.1, -0.2, 0.3], np.float32)


def at(values, dtype=jnp.float32):
    """The values at the start of the first row. One shape in all tests: few compiles."""
    return jnp.zeros(SHAPE, dtype).at[0, : len(values)].set(jnp.asarray(values, dtype))


def answers_of(lengths=(3,), targets=()):
    """Answers at the start of the first row, without prompts."""
    numbers = at(np.repeat(np.arange(1, len(lengths) + 1), lengths), jnp.int32)
    weights = (numbers > 0).astype(jnp.float32)
    targets = at(targets, jnp.int32)
    return find_answers({"segment_ids": numbers, "weights": weights, "targets": targets})


def close(found, expected, **options):
    """Compares what is found, or the start of its first row."""
    found = np.asarray(found)
    if found.shape == SHAPE:
        found = found[0, : np.size(expected)]
    np.testing.assert_allclose(found, expected, **({"atol": 1e-5} | options))


def test_advantages_of_a_group():
    rewards = np.array([1.0, 0, 0, 0])
    given = rewards, np.zeros(4, int), np.array([3, 1, 2, 5])
    close(of_rewards.group_normalised()(*given), [1.5, -0.5, -0.5, -0.5])
    close(of_rewards.group_normalised(ddof=0)(*given), [1.732048, *[-0.577349] * 3])
    close(of_rewards.centred()(*given), [0.75, -0.25, -0.25, -0.25])
    close(of_rewards.leave_one_out()(*given), [1, *[-1 / 3] * 3])
    close(of_rewards.rewards_themselves()(*given), rewards)
    close(of_rewards.rewards_themselves("batch")(*given), rewards - 0.25)


def test_advantages_by_statistics_of_tokens():
    """Against the tokens themselves; equal lengths give those of answers with squares over G."""
    make, groups = of_rewards.token_normalised, np.zeros(4, int)
    rewards, lengths = np.array([1.0, 0, 0.5, 0]), np.array([3, 1, 2, 5])
    tokens = np.repeat(rewards, lengths)
    close(make()(rewards, groups, lengths), (rewards - tokens.mean()) / tokens.std())
    expected = of_rewards.group_normalised(ddof=0)(rewards, groups, lengths)
    close(make()(rewards, groups, np.full(4, 7)), expected)
    # One token against 99: 9.95 deviations.
    rare = np.array([1.0, 0.0]), np.zeros(2, int), np.array([1, 99])
    close(make()(*rare), of_rewards.group_normalised()(*rare))
    close(make(largest=10.0)(*rare), [9.9499, -0.1005], atol=1e-3)
    # Another group is not affected, and a failed answer has no tokens.
    both = np.append(rare[0], [*rewards, np.nan]), np.repeat([0, 1], [2, 5])
    found = make()(*both, np.append(rare[2], [*lengths, 50]))
    close(found[2:6], make()(rewards, groups, lengths), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_groups_do_not_mix_and_failures_are_left_out(data):
    number = data.draw(st.integers(1, 12))
    values = st.sampled_from([0.0, 0.1, 0.5, 1.0, math.nan])
    rewards = np.array(data.draw(st.lists(values, min_size=number, max_size=number)))
    groups = np.array(data.draw(st.lists(st.integers(3, 5), min_size=number, max_size=number)))
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=number, max_size=number)))
    for name in ("group_normalised", "token_normalised", "centred", "leave_one_out"):
        make = getattr(of_rewards, name)
        found = make()(rewards, groups, lengths)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert not found[np.isnan(rewards)].any()
        for group in np.unique(groups):
            own = (groups == group) & ~np.isnan(rewards)
            close(found[own], make()(rewards[own], groups[own], lengths[own]), atol=0)
            sums = [abs(found[own].sum()), abs(found[own] @ lengths[own])]
            # Over answers, or over tokens where those are what is averaged over.
            assert (min(sums) if name == "token_normalised" else sums[0]) < 1e-4
            # Equal rewards: exactly nothing, where a mean of floats is off by rounding.
            if len(set(rewards[own])) <= 1:
                assert not found[own].any()


def test_the_most_varied_answers_are_kept():
    rewards = np.array([0.0, 0.4, 0.5, 0.65, 1.0, 0.3, 0.7, math.nan])
    groups = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    given = rewards, groups, np.ones(8)
    all_of_them = of_rewards.centred()(*given)
    found = of_rewards.most_varied(of_rewards.centred(), 3)(*given)
    best = max(
        itertools.combinations(range(5), 3), key=lambda chosen: np.var(all_of_them[[*chosen]])
    )
    assert set(np.flatnonzero(found[:5])) == set(best) - {2}
    kept = found != 0
    close(found[kept], all_of_them[kept], atol=0)
    close(found[5:], all_of_them[5:], atol=0)
    close(of_rewards.most_varied(of_rewards.centred(), 0)(*given), all_of_them, atol=0)


RATIOS = {
    "token": [1.105171, 0.818731, 1.349859],
    "sequence": [1.068939] * 3,
    "sequence_token": [1.068939] * 3,
    "cumulative": [1.105171, 0.904837, 1.221403],
    "cumulative_mean": [1.105171, 0.951229, 1.068939],
    "prefix_min": [1.105171, 0.904837, 1.105171],
    "segment": [0.951229, 0.951229, 1.349859],
}


@pytest.mark.parametrize("name", RATIOS)
def test_ratios(name):
    answers, single, old, x = answers_of(targets=[0, 9, 0]), answers_of((1,)), at([]), at(TOY)
    for detached in (True, False):
        ratio = ratios.make_ratio(name, detached, (9,))
        close(jnp.exp(ratio(answers, x, old)), RATIOS[name])
        # On-policy all are 1; one token is one token.
        assert not np.any(ratio(answers, x, x))
        close(ratio(single, x, old), TOY[:1])
    assert set(RATIOS) == set(ratios.RATIOS)


@pytest.mark.parametrize("name", ["token", "sequence", "sequence_token", "cumulative"])
def test_what_of_a_ratio_has_a_gradient(name):
    answers, ratio = answers_of(), ratios.make_ratio(name)
    slopes = jax.grad(lambda x: ratio(answers, x, at([]))[0, 1])(at(TOY))
    close(slopes, [1 / 3] * 3 if name == "sequence" else [0, 1, 0])


def test_limits_of_ratios():
    """One sentence is an answer, sentences of one token are tokens; the last mean is GSPO's."""
    x, old = at(TOY), at([])
    one, each = answers_of(targets=[0, 0, 9]), answers_of(targets=[9, 9, 9])
    segment = ratios.segment((9,))
    close(segment(one, x, old), ratios.sequence(one, x, old)[0, :3])
    close(segment(each, x, old), TOY)
    close(ratios.cumulative_mean(one, x, old)[0, 2], ratios.sequence(one, x, old)[0, 2])
    # The factor of the prefix alone.
    close(jnp.exp(ratios.prefix_minima(one, x)), [1, 1.105171, 0.818731])


def test_bounds():
    answers, x, old = answers_of(), at(TOY), at([])
    bounds = clipping.by_position(answers, 0.025, 0.05, 0.5)
    close(jnp.log(bounds.low), [-0.025, -0.035355, -0.043301])
    close(jnp.log(bounds.high), [0.05, 0.070711, 0.086603])
    ratio = jnp.exp(ratios.cumulative(answers, x, old))
    close(jnp.clip(ratio, bounds.low, bounds.high), [1.051271, 0.965262, 1.090463])
    fixed = clipping.by_position(answers, 0.025, 0.05, 0.0)
    close(jnp.log(fixed.low), [-0.025] * 3)
    low, high, _ = clipping.by_entropy(jnp.array([0.5, -0.5, 0.0]), 0.2, 0.2)
    close(1 - low, [0.2, 0.3, 0.2])
    close(high - 1, [0.3, 0.2, 0.2])
    assert clipping.constant(0.0, 0.0) == (0, math.inf, math.inf)


def test_entropy_of_a_token_among_others():
    answers, entropy = answers_of((5,)), at([0.1, 0.5, 1, 2, 4])
    close(relative_entropy(answers, entropy), [-1, -0.462756, -0.231378, 0, 1])
    close(relative_entropy(answers, entropy, released=True), [1, 0.462756, 0.231378, 0, 1])
    assert not np.any(relative_entropy(answers, jnp.full(SHAPE, 0.7)))
    scale = entropy_scale(answers, entropy)
    factors = temperature_factors(scale, entropy[0, :5], 0.05)
    close(factors, [0.95, 0.976862, 0.988431, 1, 1.05])
    close(temperature_factors(scale, jnp.array([1e-9, 90.0]), 0.05), [0.95, 1.05])
    close(temperature_factors(no_scale(), entropy[0, :5], 0.05), [1] * 5, atol=0)
    code = entropy_scale(answers, entropy, released=True)
    close(temperature_factors(code, entropy[0, :3], 0.05), [1.05, 1.023138, 1.011569])
    h, r = jnp.array([0.5, 0.5, -0.5, -0.5]), jnp.array([1.0, 1.3, 1.0, 1.3])
    close(redistributed(jnp.ones(4), r, h, 1.0, 0.2, 0.2), [1, 1.5, 0.5, 1])
    close(redistributed(jnp.ones(4), r, 0 * h, 1.0, 0.2, 0.2), [1, 1, 1, 1])


def test_surrogates():
    bounds = clipping.constant(0.2, 0.2, 3.0)
    ratio, log_p = jnp.array([0.5, 1.0, 1.5, 4.0]), jnp.array([-1.0, -2.0, -0.5, -3.0])
    ones = jnp.ones(4)
    close(surrogates.ppo(ratio, log_p, ones, bounds), [-0.5, -1, -1.2, -1.2])
    close(surrogates.ppo(ratio, log_p, -ones, bounds), [0.8, 1, 1.5, 3])
    without = clipping.constant(0.2, 0.2)
    close(surrogates.ppo(ratio, log_p, -ones, without), [0.8, 1, 1.5, 4])
    close(surrogates.cispo(ratio, log_p, ones, bounds), -log_p * jnp.array([0.8, 1, 1.2, 1.2]))
    gate = surrogates.sapo()
    close(gate(ones, log_p, -ones, bounds), [1.904762] * 4)
    close(gate(ones, log_p, ones, bounds), [-2] * 4)
    for sign in (1.0, -1.0):
        slope = jax.grad(lambda r, a=sign: gate(r, r, jnp.float32(a), bounds))(jnp.float32(1.0))
        assert slope == pytest.approx(-sign, abs=1e-6)
    low, high = surrogates.clipped("ppo", ratio, ones, bounds)
    assert (low.tolist(), high.tolist()) == ([False] * 4, [False, False, True, True])
    low, high = surrogates.clipped("ppo", ratio, -ones, bounds)
    assert (low.tolist(), high.tolist()) == ([True, *[False] * 3], [False, False, False, True])


def test_divergences_and_weights():
    close(kl.k3(jnp.log(0.4) - jnp.log(0.5)), 0.026856)
    k = jnp.array([0.4, 0.5, 1, 5, 5.1])
    close(token_weights.icepop(jnp.log(k)), [0, 0.5, 1, 5, 0])
    # The released numbers: two members of a group of two positions each.
    p = np.array([[[0.7, 0.3], [0.5, 0.5]], [[0.3, 0.7], [0.5, 0.5]]])
    apart = np.log(p).mean(0, keepdims=True) - np.log(p)
    divergence = (np.exp(apart) - apart - 1).sum(-1).mean(0)
    close(divergence, [0.182179, 0])
    members, ids = answers_of((2, 2)), jnp.full(SHAPE, 6)
    x = at([*divergence, *divergence])
    close(token_weights.group_divergence(members, ids, x, 1.7), [1.7, 1, 1.7, 1])
    close(token_weights.group_divergence(members, ids, 0 * x, 1.7), [1] * 4)
    close(token_weights.group_divergence(members, ids, x, 1.0), [1] * 4)
    score = at([0.1, 0.45, 0.4])
    for share in (0.5, jnp.float32(0.5)):
        kept = token_weights.by_advantage_and_entropy(
            answers_of(), at([1, -0.5, 0.2]), at([0.1, 0.9, 2]), share
        )
        close(kept, [0, 1, 1])
        close(token_weights.keep_highest(answers_of(), score, share), [0, 1, 1])
    close(token_weights.keep_highest(answers_of(), score, 1.0), [1, 1, 1])
    assert token_weights.linear_schedule(0.9, 0.3, 10, 3) == pytest.approx(0.72)
    assert token_weights.linear_schedule(0.9, 0.3, 10, 30) == pytest.approx(0.3)
    assert token_weights.linear_schedule(0.9, 0.3, 0, 30) == 0.9


def averages(lengths, losses, signs):
    answers = answers_of(lengths)
    losses, signs = (at(np.repeat(x, lengths)) for x in (losses, signs))
    found = {}
    for name in aggregations.AGGREGATIONS:
        factors, denominator = aggregations.make_aggregation(name, 10)(answers, signs)
        found[name] = float(jnp.sum(factors * losses) / denominator)
    return found


def test_averages():
    found = averages((2, 8), (-1.0, 0.5), (1.0, -1.0))
    expected = {"sequence_mean": -0.25, "token_mean": 0.2, "sign_balanced": -0.25}
    expected |= {"sequence_sum": 1.0, "fixed_length": 0.1}
    assert found == pytest.approx(expected, abs=1e-6)
    found = averages((2, 6, 4), (-1.0, -2.0, 1.0), (-1.0, -1.0, 1.0))
    expected = {"sequence_mean": -0.666667, "token_mean": -0.833333, "sign_balanced": -0.833333}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_advantages_of_tokens():
    """lambda = 1 is the discounted return less the value, lambda = 0 one step."""
    answers = answers_of((3, 2))
    values, rewards = at([0.3, -0.2, 0.5, 0.1, 0.4]), at([0, 0, 1, 0, 2])
    close(gae(answers, rewards, values, 1.0, 1.0), [0.7, 1.2, 0.5, 1.9, 1.6])
    close(gae(answers, rewards, values, 0.9, 0.0), [-0.48, 0.65, 0.5, 0.26, 1.6])
    # What lies between drawn targets is passed over.
    batch = {"segment_ids": at([1] * 5, jnp.int32), "targets": at([], jnp.int32)}
    holes = find_answers(batch | {"weights": at([1, 0, 1, 0, 1])})
    found = gae(holes, at([0, 9, 0, 9, 1]), at([1, 9, 2, 9, 3]), 0.9, 0.8)
    whole = gae(answers_of((3,)), at([0, 0, 1]), at([1, 2, 3]), 0.9, 0.8)
    close(found[0, :5:2], whole[0, :3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"advantage": "best"}, "advantage='best' is not one of"),
        ({"ratio": "words"}, "ratio='words' is not one of"),
        ({"token_weight": "icepop"}, "old='behaviour' leaves icepop nothing"),
        ({"mean_over": "kept"}, "mean_over='kept' needs a token_weight"),
        ({"clip_low": 1.5}, "clip_low=1.5 must be at most 1"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be at least 1"),
        ({"keep_tokens": 0.0}, "keep_tokens=0.0 must be above 0"),
        ({"sampling_temperature": 0.0}, "sampling_temperature=0.0 must be above 0"),
        ({"sentence_ends": "a,2"}, "sentence_ends='a,2' must be ids"),
        ({"ddof": 2}, "ddof=2 must be"),
        ({"k_low": 2.0, "k_high": 1.0}, "k_high=1.0 must be at least 2"),
        ({"kl_coefficient": -1.0}, "kl_coefficient=-1.0 must be at least 0"),
        ({"temperature_tau": 0.1}, "temperature_tau=0.1 must be 0 but for clip='entropy'"),
        ({"clip": "entropy", "temperature_tau": 1.0}, "temperature_tau=1.0 must be below 1"),
        (
            {"clip": "entropy", "temperature_tau": 0.1, "kl_coefficient": 0.1},
            "temperature_tau=0.1 gives each token a temperature, which neither a reference",
        ),
        ({"redistribution": 0.5}, "redistribution=0.5 must be 0 but for clip='entropy'"),
        ({"clip": "entropy", "clip_low": 0.0}, "clip_low=0.0 must be above 0"),
        ({"clip_power": math.nan}, "clip_power=nan must be a number"),
    ],
)
def test_bad_hyperparameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        POLICY["policy"](**arguments)


def test_declarations():
    """What an objective asks for follows from its arguments."""
    make = POLICY["policy"]
    assert make().advantages is not None
    assert make().references == ()
    assert not make(kl_coefficient=0.1, kl_in="reward").whole_batch
    assert make(kl_coefficient=0.1).references == ("reference_nll",)
    assert "behaviour_entropy" not in make().batch_keys
    assert "behaviour_entropy" in make(clip="entropy").batch_keys
    assert "group_divergence" in POLICY["tw_grpo"]().batch_keys
    assert "old_log_probability" in make(old="stored").batch_keys
    tempered, plain = (POLICY["hapo"](temperature_tau=tau) for tau in (0.05, 0.0))
    assert "temperatures" in set(tempered.batch_keys) & set(tempered.loss.batch_keys)
    assert "temperatures" not in plain.batch_keys
    assert plain.temper is None
    assert plain.init() == ()
    assert "entropy" in make(entropy_coefficient=0.1).differentiated
    assert "entropy" not in make().differentiated
    assert POLICY["ppo"]().whole_batch
    assert token_ids(" 3, 14") == (3, 14)
    assert token_ids("") == ()
