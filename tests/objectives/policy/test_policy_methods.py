"""Every policy gradient: against NumPy, finite differences, other layouts and micro-batches."""

import functools
import operator

import dense_policy as dense
import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
import tiny

from lm.training.gradients import make_gradients
from objectives import OBJECTIVES
from objectives.policy import POLICY
from objectives.terms import minimise

M = cases.METHODS
NUMBERS = cases.draw()
# Answers of each of eight rows: packed, and one a row.
PACKED = (*cases.ROWS, (), (), (), ())
ALONE = tuple((i,) for i in range(8))


def icepop(k):
    return np.where((k >= 0.5) & (k <= 5), k, 0)


def entropy_scores(fixed):
    pairs = zip(fixed["advantages"], fixed["behaviour_entropy"], strict=True)
    return [np.abs(a) * h for a, h in pairs]


def top_entropies(fixed):
    entropy, cut = dense.whole(fixed["behaviour_entropy"])
    return cut(entropy >= np.quantile(entropy, 0.8, method="nearest"))


# Method -> (what is fixed) -> arguments of `dense.loss`.
DEFINED = {
    "policy": {},
    "reinforce": {"surrogate": dense.reinforce, "by": "sum"},
    "rloo": {"surrogate": dense.reinforce, "by": "sum"},
    "grpo": {"by": "sequence"},
    "dr_grpo": {"by": "fixed", "row_length": cases.LENGTH},
    "dapo": {"high": 0.28},
    "balanced": {"by": "balanced"},
    "gspo": {"ratio": "sequence", "low": 3e-4, "high": 4e-4, "by": "sequence"},
    "gspo token": {"ratio": "sequence_token", "low": 3e-4, "high": 4e-4, "by": "sequence"},
    "sspo": {"ratio": "sequence", "low": 1, "high": np.inf, "by": "sequence"},
    "sspo sentences": {"ratio": "segment", "low": 0.1, "by": "sequence"},
    "cispo": {"surrogate": dense.cispo, "low": 1, "high": 4},
    "minpro": {"surrogate": dense.cispo, "ratio": "prefix_min", "low": 1, "high": np.inf},
    "minpro clipped": {"surrogate": dense.cispo, "ratio": "prefix_min"},
    "sapo": {"surrogate": dense.sapo, "by": "sequence"},
    "ctpo": {"ratio": "cumulative", **dense.by_position(0.5)},
    "ctpo mean": {"ratio": "cumulative_mean", **dense.by_position(-0.5)},
    "icepop": {"old": "current", "sampler_weight": icepop},
    "icepop stored": {"old": "old_log_probability", "sampler_weight": icepop},
    "tw_grpo": lambda f: {"weights": dense.group_weights(f)},
    "d3s": {},
    "d3s half": lambda f: {"kept": dense.highest(entropy_scores(f), 0.5)},
    "d3s schedule": lambda f: {"weights": dense.highest(entropy_scores(f), 0.9 - 0.6 * 3 / 10)},
    "hapo": dense.hapo,
    "hapo released": lambda f: dense.hapo(f, released=True),
    "quantile": lambda f: {"weights": top_entropies(f)},
    "grpo k3": {"by": "sequence", "kl": "k3", "beta": 0.3, "dual": 3.0, "entropy": 0.1},
    "rloo k1": {
        "surrogate": dense.reinforce, "by": "sum", "kl": "k1", "beta": 0.3, "kl_in": "reward"
    },
    "policy k2": {"by": "sum", "kl": "k2", "beta": 0.2},
}  # fmt: skip
PPO = {
    "ppo": (1.0, 1.0, "return"),
    "ppo kl": (0.9, 0.8, "group", 0.1, True),
    "ppo answer": (0.9, 0.8, "answer", 0.0, False, 0.1),
}


def sspo_entropy(fixed):
    h = dense.relative_entropy(fixed["behaviour_entropy"])

    def of(i, length):
        return 1 - 0.1 * (1 - np.minimum(h[i], 0)), 1 + 0.2 * (1 + np.maximum(h[i], 0)), np.inf

    return {"ratio": "segment", "bounds": of, "by": "sequence"}


DEFINED["sspo entropy"] = sspo_entropy


def dense_loss(name, x, fixed):
    if name in PPO:
        return dense.ppo_with_values(x, fixed, *PPO[name])
    arguments = DEFINED[name]
    arguments = arguments(fixed) if callable(arguments) else arguments
    return dense.loss(x, fixed, **arguments)


def finite_differences(name, fixed, size=1e-6):
    """{name of a statistic: slope of every token of every answer}."""
    x = {key: [np.array(one) for one in fixed[key]] for key in ("log_p", "entropy", "value")}
    found = {key: [np.zeros_like(one) for one in values] for key, values in x.items()}
    for key, values in x.items():
        for answer, one in enumerate(values):
            for t in range(len(one)):
                kept, sides = one[t], []
                for change in (size, -size):
                    one[t] = kept + change
                    sides.append(dense_loss(name, x, fixed))
                one[t] = kept
                found[key][answer][t] = (sides[0] - sides[1]) / (2 * size)
    return found


@functools.cache
def packed():
    return cases.make_inputs(NUMBERS, PACKED)


@functools.cache
def alone():
    return cases.make_inputs(NUMBERS, ALONE)


def in_answers(array, rows):
    """The numbers of each answer of an array [B, T]."""
    found = {}
    for row, answers in enumerate(rows):
        start = 0
        for answer in answers:
            size = len(NUMBERS["log_p"][answer])
            start += cases.PROMPT
            found[answer] = np.asarray(array)[row, start : start + size]
            start += size
    return [found[i] for i in range(len(found))]


# Those that stand for the others where a test of all of them takes long.
SOME = ("policy", "balanced", "sspo sentences", "minpro", "tw_grpo", "d3s half", "hapo", "ppo kl")


def test_every_method_has_a_definition():
    assert set(DEFINED) | set(PPO) == set(M)
    assert {name.partition(" ")[0] for name in M} >= set(POLICY)
    assert set(POLICY) <= set(OBJECTIVES)


@pytest.mark.parametrize("name", tiny.mostly_slow(M, quick=("policy", "minpro", "gspo", "ppo kl")))
def test_value_and_gradient_are_those_of_the_equations(name):
    """Gradients by float64 finite differences; NaN at all that was not drawn."""
    (value, _), grads = cases.run(M[name], packed())
    x = {key: NUMBERS[key] for key in ("log_p", "entropy", "value")}
    assert value == pytest.approx(dense_loss(name, x, NUMBERS), rel=2e-5, abs=2e-6)
    slopes = finite_differences(name, NUMBERS)
    drawn = np.asarray(packed()[1]["weights"]) != 0
    for key, expected in slopes.items():
        found = np.asarray(grads[key])
        np.testing.assert_array_equal(found[~drawn], 0.0)
        for one, other in zip(in_answers(found, PACKED), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)
    assert np.abs(grads["log_p"]).max() > 0


@pytest.mark.parametrize("name", tiny.mostly_slow(M, ("policy", "ppo kl")))
def test_packing_and_the_order_of_rows_do_not_matter(name):
    """Also over rows that are padding as a whole: there are four in the packed batch."""
    (value, terms), grads = cases.run(M[name], packed())
    turned = PACKED[::-1]
    layouts = {ALONE: alone(), turned: jax.tree.map(lambda x: x[::-1], packed())}
    for rows, inputs in layouts.items():
        (other, its_terms), its_grads = cases.run(M[name], inputs)
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6)
        for key in terms:
            np.testing.assert_allclose(its_terms[key], terms[key], rtol=1e-5, atol=1e-6)
        for key in grads:
            pairs = zip(
                in_answers(grads[key], PACKED), in_answers(its_grads[key], rows), strict=True
            )
            for one, its in pairs:
                np.testing.assert_allclose(its, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", tiny.mostly_slow(sorted(M.keys() - PPO), quick=SOME[1:2]))
def test_micro_batches_add_up(name):
    """Sums of micro-batches over the denominators of the whole batch."""
    objective, (read, batch, references) = M[name], packed()
    (value, terms), grads = cases.run(objective, packed())
    prepared = objective.prepare(None, {}, batch, references, (), 3)
    found, slopes = [], []
    for start in range(4):
        own, micro, rows = jax.tree.map(
            operator.itemgetter(slice(start, None, 4)), (read, batch, prepared.rows)
        )

        def loss(own, micro=micro, rows=rows):
            statistics = cases.statistics(objective, own)
            return minimise(objective.terms(statistics, {}, micro, prepared._replace(rows=rows)))

        (part, parts), slope = jax.value_and_grad(loss, has_aux=True)(own)
        found.append({"value": part, **parts})
        slopes.append(slope["log_p"])
    sums = jax.tree.map(lambda *x: sum(x), *found)
    np.testing.assert_allclose(sums.pop("value"), value, rtol=1e-5, atol=1e-6)
    for key in sums.keys() - {"ratio_max", "ratio_min"}:
        np.testing.assert_allclose(sums[key], terms[key], rtol=1e-5, atol=1e-6)
    together = jnp.stack(slopes, 1).reshape(grads["log_p"].shape)
    np.testing.assert_allclose(together, grads["log_p"], rtol=1e-5, atol=1e-7)


def scaled_statistics(objective):
    """(trained, batch) -> statistics: those of the batch, times one parameter a token id."""

    def statistics(trained, batch):
        read = {name: batch[name] for name in ("log_p", "entropy", "value")}
        scales = trained["scale"][batch["targets"]]
        # What was not drawn is NaN, and would be in the gradient of the product.
        live = batch["weights"] != 0
        read = jax.tree.map(lambda x: jnp.where(live, x, 0.0) * scales, read)
        return cases.statistics(objective, read), {}

    return statistics


@pytest.mark.parametrize("name", tiny.mostly_slow(["grpo k3", "ppo kl"], quick=["ppo kl"]))
def test_the_step_gives_the_same_with_micro_batches(name):
    objective, (read, batch, references) = M[name], packed()
    batch = {**batch, **read, **references}
    found = []
    for accumulation in (1, 4):
        run = make_gradients(scaled_statistics(objective), objective, accumulation)
        found.append(jax.jit(run)({"scale": jnp.ones(5)}, batch, (), 3)[:2])
    (grads, metrics), (other, its_metrics) = found
    np.testing.assert_allclose(other["scale"], grads["scale"], rtol=1e-4, atol=1e-6)
    assert np.abs(grads["scale"]).max() > 0
    for key in metrics.keys() - {"ratio_max", "ratio_min"}:
        np.testing.assert_allclose(its_metrics[key], metrics[key], rtol=1e-5, atol=1e-6)


ON_POLICY = {
    name: objective
    for name, objective in M.items()
    if "kl" not in name
    and not name.startswith(("ppo", "d3s ", "quantile", "hapo", "tw_grpo", "dr_grpo", "reinforce"))
    and name not in ("grpo k3", "rloo k1", "policy k2", "rloo")
} | {
    "hapo neutral": POLICY["hapo"](redistribution=0.0),
    "tw_grpo neutral": POLICY["tw_grpo"](alpha=1.0),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(ON_POLICY, quick=("gspo", "sapo", "minpro")))
def test_on_policy_gradients_are_those_of_reinforce(name):
    """With neutral settings, and with the same average; the value of SAPO is another."""
    numbers = dict(NUMBERS)
    for key in ("behaviour_log_probability", "old_log_probability"):
        numbers[key] = numbers["log_p"]
    inputs = cases.make_inputs(numbers, PACKED)
    by = {"gspo": "sequence_mean", "sspo": "sequence_mean", "sapo": "sequence_mean"}
    by |= {"grpo": "sequence_mean", "balanced": "sign_balanced"}
    average = by.get(name.partition(" ")[0], "token_mean")
    plain = POLICY["policy"](surrogate="reinforce", aggregation=average)
    (_, expected_terms), expected = cases.run(plain, inputs)
    (value, terms), grads = cases.run(ON_POLICY[name], inputs)
    np.testing.assert_allclose(grads["log_p"], expected["log_p"], rtol=1e-4, atol=1e-7)
    assert terms["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert terms["kl_behaviour_k3"] == pytest.approx(0, abs=1e-6)
    assert terms["clip_low"] == terms["clip_high"] == 0
    assert expected_terms["entropy"] == terms["entropy"]
    if name == "sapo":
        (clipped, _), _ = cases.run(POLICY["grpo"](), inputs)
        assert abs(value - clipped) > 0.1


@pytest.mark.parametrize("name", ["grpo", "sapo", "ppo"])
def test_equal_rewards_leave_nothing_to_learn(name):
    numbers = dict(NUMBERS)
    numbers["advantages"] = [0 * x for x in numbers["advantages"]]
    objective = M[name]
    if name == "ppo":
        numbers["rewards"] = [0 * x for x in numbers["rewards"]]
        numbers["value"] = [0 * x for x in numbers["value"]]
    (_, terms), grads = cases.run(objective, cases.make_inputs(numbers, PACKED))
    np.testing.assert_array_equal(grads["log_p"], 0.0)
    assert terms["no_signal"] == 1


def test_a_batch_without_answers_is_zero():
    read, batch, references = packed()
    batch = {**batch, "weights": jnp.zeros_like(batch["weights"])}
    for name in SOME:
        (value, terms), grads = cases.run(M[name], (read, batch, references))
        assert value == 0, name
        assert all(np.isfinite(x) for x in terms.values()), name
        assert all(not np.any(x) for x in jax.tree.leaves(grads)), name


def test_a_failed_answer_is_not_learned_from():
    """Its reward is NaN and its advantage 0."""
    numbers = {name: list(values) for name, values in NUMBERS.items()}
    numbers["rewards"][1] = np.full(5, np.nan)
    numbers["advantages"][1] = np.zeros(5)
    for name in ("grpo", "ppo", "ppo kl", "ppo answer", "balanced"):
        (value, _), grads = cases.run(M[name], cases.make_inputs(numbers, PACKED))
        assert np.isfinite(value), name
        if name != "ppo answer":  # It has a bonus for entropy.
            np.testing.assert_array_equal(in_answers(grads["log_p"], PACKED)[1], 0.0)
        np.testing.assert_array_equal(in_answers(grads["value"], PACKED)[1], 0.0)


def test_what_is_reported():
    (_, terms), _ = cases.run(M["hapo"], packed())
    ratios = np.exp(np.concatenate(NUMBERS["drift"]))
    advantages = np.concatenate(NUMBERS["advantages"])
    entropies = np.concatenate(NUMBERS["behaviour_entropy"])
    high = entropies > entropies.mean()
    expected = {
        "entropy": np.concatenate(NUMBERS["entropy"]).mean(),
        "kl_behaviour_k1": -np.log(ratios).mean(),
        "kl_behaviour_k3": (ratios - 1 - np.log(ratios)).mean(),
        "ratio_max": ratios.max(),
        "ratio_min": ratios.min(),
        "advantage": advantages.mean(),
        "no_signal": 1 / 8,
        "positive_high": np.mean((advantages > 0) & high),
        "negative_low": np.mean((advantages < 0) & ~high),
    }
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, abs=1e-5), name
    (_, terms), _ = cases.run(M["policy"], packed())
    low = np.mean((ratios < 0.8) & (advantages < 0))
    assert terms["clip_low"] == pytest.approx(low, abs=1e-6)
    assert terms["clip_high"] == pytest.approx(np.mean((ratios > 1.2) & (advantages > 0)), abs=1e-6)
    assert low > 0
    assert "kl_reference" not in terms
    assert "positive_high" in terms
