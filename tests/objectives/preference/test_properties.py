"""What holds for all objectives of preferences, and where one is another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest
import tiny

from objectives.hyperparameters import hyperparameters
from objectives.preference import PREFERENCE
from objectives.preference.answers import Sides, pair_sums
from objectives.preference.bco import density_ratio, running_mean
from objectives.preference.orpo import log_odds
from objectives.preference.sparse_po import activation_mask, learned_mask
from objectives.preference.tars import perturbed
from objectives.terms import minimise

P = PREFERENCE
# Everything, and what has a path of its own through the step.
ALL = {name: factory() for name, factory in P.items()} | {
    "cdpo released": P["cdpo"](per_position=True),
    "sparse_po masked": P["sparse_po"](mask="activations"),
    "bco answers": P["bco"](mean_over="answers", match_prompts=True),
    "npo kl": P["npo"](retain="kl"),
    "ches_dpo kept": P["ches_dpo"](keep=0.5),
}
# A method with neutral settings -> its parent.
NEUTRAL = {
    "tgdpo": (P["tgdpo"](alpha=0.0), P["dpo"]()),
    "treg": (P["treg"](alpha=0.0), P["dpo"]()),
    "cdpo": (P["cdpo"](strength=0.0), P["dpo"]()),
    "cdpo both sides": (P["cdpo"](strength=0.0, only_rejected=False), P["dpo"]()),
    "sparse_po": (P["sparse_po"](divergence=0.0), P["dpo"]()),
    "sparse_po, m_u = 1": (
        P["sparse_po"](mask="activations", masked="divergences", divergence=0.0),
        P["dpo"](),
    ),
    "tars": (P["tars"](share=0.0), P["dpo"]()),
    "ches_dpo": (P["ches_dpo"](keep=1.0), P["dpo"]()),
    "conservative": (P["dpo"](label_smoothing=0.0), P["dpo"]()),
    "cpo": (P["cpo"](alpha=0.0), P["dpo"](reference_free=True)),
    "bco": (P["bco"](match_prompts=True, lowest_ratio=1.0, highest_ratio=1.0), P["bco"]()),
    "kto": (
        P["kto"](reference_point="mismatched"),
        P["kto"](reference_point="zero"),
    ),
}


@functools.cache
def results(name):
    """Of the objective `name` on one case: its inputs, value, terms, state and gradients."""
    x = cases.make_inputs(ALL[name], cases.case())
    (value, (terms, state)), grads = cases.run(ALL[name], x)
    return x, value, terms, state, grads


@pytest.mark.parametrize("name", tiny.mostly_slow(NEUTRAL, ("tgdpo", "cpo", "kto")))
def test_with_neutral_settings_a_method_is_its_parent_bit_for_bit(name):
    objective, parent = NEUTRAL[name]
    one = cases.case(seed=3)
    if name == "kto":  # The estimate is negative, so that the reference point is 0.
        one = one._replace(
            log_p=one.log_p._replace(mismatched=[x - 9 for x in one.log_p.mismatched])
        )
    rows = cases.ROWS
    x = cases.make_inputs(objective, one, rows)
    of_parent = cases.make_inputs(parent, one, rows)
    if name == "kto":
        # The same rows, with the mismatched answers that the other one does not read.
        of_parent = of_parent._replace(
            log_p=x.log_p, divergence=x.divergence, batch=x.batch, references=x.references
        )
    (value, (terms, _)), (grad, _) = cases.run(objective, x)
    (wanted, (its, _)), (its_grad, _) = cases.run(parent, of_parent)
    assert float(value) == float(wanted)
    np.testing.assert_array_equal(grad, its_grad)
    for key in terms.keys() & its.keys():
        assert float(terms[key]) == float(its[key]), key


@pytest.mark.parametrize(
    ("name", "parent"),
    tiny.rows_mostly_slow(
        [
            *((name, "dpo") for name in ("tgdpo", "treg", "cdpo", "sparse_po", "ches_dpo kept")),
            ("sparse_po masked", "sparse_po"),
            ("bco answers", "bco"),
        ],
        (0, 2, 6),
    ),
)
def test_with_other_settings_it_is_not(name, parent):
    """Otherwise the test above could not fail."""
    assert float(results(name)[1]) != pytest.approx(float(results(parent)[1]), rel=1e-5)


@pytest.mark.parametrize("name", tiny.mostly_slow(ALL, ("dpo", "kto", "orpo", "cdpo released")))
def test_what_has_no_weight_counts_for_nothing(name):
    """What stands in prompts and padding, and how long they are, does not matter."""
    x, value, terms, _, grads = results(name)
    assert np.isfinite(value)
    for grad in grads:
        assert not np.any(np.asarray(grad)[x.batch["weights"] == 0])
    for other, prompt in ((1e30, cases.PROMPT), (np.inf, 1)):
        moved = cases.make_inputs(ALL[name], cases.case(), other=other, prompt=prompt)
        (again, (its_terms, _)), its_grads = cases.run(ALL[name], moved)
        assert float(again) == pytest.approx(float(value), rel=1e-6)
        for key, term in its_terms.items():
            assert float(term) == pytest.approx(float(terms[key]), rel=1e-5, abs=1e-6), key
        for grad, before in zip(its_grads, grads, strict=True):
            now, then = (
                np.asarray(g)[np.asarray(of.batch["weights"]) != 0]
                for g, of in ((grad, moved), (before, x))
            )
            np.testing.assert_allclose(now, then, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_pairs_can_stand_anywhere(name):
    """The order of pairs and the rows that they share do not matter."""
    _, value, terms, _, _ = results(name)
    x = cases.make_inputs(ALL[name], cases.case(), rows=((3,), (2, 0), (1,)))
    (other, (its_terms, _)), _ = cases.run(ALL[name], x)
    assert float(other) == pytest.approx(float(value), rel=2e-6)
    for key, term in its_terms.items():
        assert float(term) == pytest.approx(float(terms[key]), rel=2e-5, abs=1e-6), key


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        [name for name in ALL if not ALL[name].whole_batch],
        quick=("dpo", "cdpo released"),
    ),
)
def test_micro_batches_add_up_to_the_whole(name):
    objective = ALL[name]
    x, value, terms, _, (grad, _) = results(name)
    prepared = objective.prepare(None, {}, x.batch, x.references, x.state, 0)

    def minimised(log_p, micro, rows):
        found = cases.statistics(objective, log_p, micro.divergence)
        its = prepared._replace(rows=rows)
        return minimise(objective.terms(found, micro.aux, micro.batch, its))

    compiled = jax.jit(jax.value_and_grad(minimised, has_aux=True))
    count, sums, found = x.log_p.shape[0], {}, []
    for row in range(count):
        micro, rows = jax.tree.map(lambda a, r=row: a[r : r + 1], (x, prepared.rows))
        (part, its), its_grad = compiled(micro.log_p, micro, rows)
        sums = {key: sums.get(key, 0.0) + float(term) for key, term in its.items()}
        found.append((float(part), its_grad))
    assert sum(part for part, _ in found) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in found]), grad, rtol=1e-5, atol=1e-7)
    for key, total in sums.items():
        assert total == pytest.approx(float(terms[key]), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ALL)
def test_half_a_pair_and_an_empty_batch_are_finite(name):
    """A pair without a rejected answer is none; a NaN in it does not matter to losses of pairs."""
    x, *_ = results(name)
    lost = (x.batch["pair_ids"] == 0) & (x.batch["sides"] == -1)
    for weights in (jnp.where(lost, 0.0, x.batch["weights"]), 0 * x.batch["weights"]):
        half = x._replace(batch={**x.batch, "weights": weights})
        (value, (terms, _)), grads = cases.run(ALL[name], half)
        assert np.isfinite(value)
        assert all(np.isfinite(term) for term in terms.values())
        assert all(np.isfinite(grad).all() for grad in grads)
    assert float(value) == 0


@pytest.mark.parametrize("name", ALL)
def test_what_is_reported(name):
    _, _, terms, _, _ = results(name)
    wanted = {"loss", "reward_chosen", "reward_rejected", "log_probability_chosen"}
    wanted |= {"log_probability_rejected"}
    if "reference_nll" in ALL[name].references:
        wanted.add("log_ratio")
    if not ALL[name].unpaired:
        wanted |= {"margin", "accuracy"}
    if ALL[name].teachers:
        wanted.add("reference_kl")
    assert wanted <= terms.keys()


def test_metrics_are_those_of_their_definition():
    one, (_, _, terms, _, _) = cases.case(), results("dpo")
    sums = [np.array([x.sum() for x in side]) for side in one.log_p[:2]]
    nll = [np.array([x.sum() for x in side]) for side in one.known["reference_nll"][:2]]
    rewards = [0.1 * (a + b) for a, b in zip(sums, nll, strict=True)]
    tokens = sum(map(sum, cases.LENGTHS))
    expected = {
        "log_probability_chosen": sums[0].mean(),
        "log_probability_rejected": sums[1].mean(),
        "reward_chosen": rewards[0].mean(),
        "reward_rejected": rewards[1].mean(),
        "margin": (rewards[0] - rewards[1]).mean(),
        "accuracy": (rewards[0] > rewards[1]).mean(),
        "log_ratio": sum(rewards).sum() / 0.1 / tokens,
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5), name


def test_a_tie_is_half_right():
    one = cases.case()
    same = cases.Answers(one.log_p.chosen, one.log_p.chosen, one.log_p.chosen)
    tied = cases.Case(same, {k: cases.Answers(*[v.chosen] * 3) for k, v in one.known.items()})
    (value, (terms, _)), _ = cases.run(P["dpo"](), cases.make_inputs(P["dpo"](), tied))
    assert float(terms["accuracy"]) == 0.5
    assert float(value) == pytest.approx(np.log(2))


def test_weights_are_no_masks():
    """A weight of 2 counts twice in sums and in lengths."""
    batch = {k: jnp.asarray(v) for k, v in cases.make_batch().items()}
    double = {**batch, "weights": 2 * batch["weights"]}
    one = jnp.where(batch["weights"] != 0, 0.5, jnp.nan)
    for side, other in zip(pair_sums(batch, one), pair_sums(double, one), strict=True):
        np.testing.assert_array_equal(2 * side, other)
    assert isinstance(pair_sums(batch, one), Sides)


BAD = {
    "dpo": [{"beta": 0.0}, {"label_smoothing": 0.5}, {"robust": True}, {"beta": np.nan}],
    "ipo": [{"beta": -1.0}],
    "kto": [{"beta": 0.0}, {"desirable_weight": -1.0}, {"reference_point": "none"}],
    "orpo": [{"beta": -0.1}],
    "simpo": [{"beta": 0.0}, {"gamma": -0.1}, {"label_smoothing": -0.1}],
    "cpo": [{"beta": 0.0}, {"alpha": -1.0}],
    "tgdpo": [{"alpha": -1.0}, {"beta": 0.0}],
    "treg": [{"alpha": -1.0}, {"beta": 0.0}],
    "cdpo": [{"strength": 1.5}, {"beta": 0.0}],
    "sparse_po": [{"beta": 0.0}, {"mask": "x"}, {"masked": "x"}, {"divergence": -1.0}],
    "tars": [{"share": 1.0}, {"share": -0.1}, {"mask_token": -2}],
    "ches_dpo": [{"keep": 0.0}, {"beta": 0.0}],
    "bco": [{"beta": 0.0}, {"mean_over": "x"}, {"lowest_ratio": 2.0, "highest_ratio": 1.0}],
    "npo": [{"beta": 0.0}, {"gamma": -1.0}, {"alpha": -1.0}, {"retain": "x"}],
    "sim_npo": [{"beta": 0.0}, {"delta": -1.0}, {"retain": "x"}],
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_bad_hyperparameter_is_named(name):
    for given in BAD[name]:
        assert given.keys() <= hyperparameters(P[name]).keys()
        with pytest.raises(ValueError, match=rf"^({'|'.join(given)})="):
            P[name](**given)


def test_the_delta_of_bco_is_the_mean_of_all_rewards_so_far():
    objective = P["bco"](beta=1.0)
    seen, state = [], objective.init()
    for seed in range(3):
        one = cases.case(seed)
        x = cases.make_inputs(objective, one)._replace(state=state)
        (_, (terms, state)), _ = cases.run(objective, x)
        for side in ("chosen", "rejected"):
            pairs = zip(
                getattr(one.log_p, side), getattr(one.known["reference_nll"], side), strict=True
            )
            seen += [np.sum(a + b) for a, b in pairs]
        assert float(terms["delta"]) == pytest.approx(np.mean(seen), rel=1e-5)
    assert state["count"].dtype == state["mean"].dtype == jnp.float32
    assert float(state["count"]) == len(seen)
    empty = running_mean(objective.init(), jnp.float32(0), jnp.float32(0))
    assert float(empty["mean"]) == 0


def test_bco_bounds_dpo_for_every_delta():
    rng = np.random.default_rng(0)
    w, s, delta = rng.standard_normal((3, 100)) * 3
    bound = np.logaddexp(0, delta - w) + np.logaddexp(0, s - delta)
    assert np.all(bound >= np.logaddexp(0, s - w))
    np.testing.assert_allclose(
        density_ratio(jnp.array([0.0, 0.5, 0.75, 1.0]), 0.5, 10.0), [0.5, 1, 3, 10], rtol=1e-6
    )


def test_odds_keep_their_digits_at_both_ends():
    log_p = np.array([-40.0, -1.0, -1e-3, -1e-6])
    exact = log_p - np.log(-np.expm1(log_p))
    np.testing.assert_allclose(log_odds(jnp.asarray(log_p, jnp.float32)), exact, rtol=2e-5)
    slope = jax.vmap(jax.grad(log_odds))(jnp.asarray([-40.0, -1.0, -1e-3, 0.0], jnp.float32))
    exact = [*(1 / -np.expm1(log_p[:3])), 0]
    np.testing.assert_allclose(slope, exact, rtol=2e-4)


def test_the_mask_of_activations():
    """Means over units 1, 3, 2 of a chosen answer, 5, 5 of a rejected one."""
    batch = {k: jnp.asarray(v) for k, v in cases.make_batch(((3, 2),), ((0,),)).items()}
    states = np.full((*batch["weights"].shape, 2), np.nan, np.float32)
    live = np.asarray(batch["weights"]) != 0
    states[live] = [[0, 2], [3, 3], [4, 0], [5, 5], [4, 6]]
    mask = np.asarray(activation_mask(batch, jnp.asarray(states)))
    np.testing.assert_allclose(mask[live], [0, 1, 0.5, 1, 1])
    assert not mask[~live].any()
    # Any z-score of the means is undone.
    np.testing.assert_allclose(
        np.asarray(activation_mask(batch, jnp.asarray(3 * states - 7)))[live], mask[live], atol=1e-6
    )


def test_the_learned_mask_is_that_of_the_layers_one_by_one():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 2, 4, 6))
    params = {
        "scale": rng.standard_normal(6),
        "offset": rng.standard_normal(6),
        "weights": rng.standard_normal((3, 6)),
        "biases": rng.standard_normal(3),
        "mixer": rng.standard_normal(3),
    }
    found = learned_mask(jax.tree.map(jnp.asarray, params), jnp.asarray(states))
    for row in range(2):
        for place in range(4):
            score = 0.0
            for layer in range(3):
                x = states[layer, row, place]
                x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * params["scale"] + params["offset"]
                unit = max(0, x @ params["weights"][layer] + params["biases"][layer])
                score += params["mixer"][layer] * unit
            assert float(found[row, place]) == pytest.approx(max(0, score), abs=1e-5)
    assert np.any(found > 0)
    assert np.any(found == 0)


@pytest.mark.parametrize("mask_token", [-1, 77])
def test_replaced_tokens_are_inputs_of_answers_and_no_targets(mask_token):
    lengths = ((30, 20), (25, 40))
    made = cases.make_batch(lengths, ((0,), (1,)), length=80)
    batch = {k: jnp.asarray(v) for k, v in made.items()}
    shape = batch["tokens"].shape
    batch["keys"] = jax.random.split(jax.random.key(0), shape)
    batch["targets"] = batch["targets"] + 1000
    new = perturbed(batch, 0.5, mask_token)
    changed = np.asarray(new["tokens"] != batch["tokens"])
    dropped = np.asarray((new["weights"] == 0) & (batch["weights"] != 0))
    np.testing.assert_array_equal(changed[:, 1:], dropped[:, :-1])
    inside = np.asarray(batch["weights"] != 0)
    np.testing.assert_array_equal(np.asarray(new["weights"]) != 0, inside & ~dropped)
    # The last target of an answer is no input.
    last = inside & ~np.pad(inside[:, 1:], ((0, 0), (0, 1)))
    assert not dropped[last].any()
    assert 0.3 < dropped.sum() / (inside & ~last).sum() < 0.7
    if mask_token < 0:
        allowed = np.asarray(batch["targets"])[inside]
        assert set(np.asarray(new["tokens"])[changed]) <= set(allowed)
    else:
        assert set(np.asarray(new["tokens"])[changed]) == {mask_token}
    same = perturbed(batch, 1e-9, mask_token)
    np.testing.assert_array_equal(same["tokens"], batch["tokens"])
    np.testing.assert_array_equal(same["weights"], batch["weights"])


def test_ches_keeps_the_pairs_with_the_lowest_scores():
    objective = P["ches_dpo"](keep=0.5)
    x = cases.make_inputs(objective, cases.case())
    prepared = objective.prepare(None, x.aux, x.batch, x.references, (), 0)
    kept, scores = np.asarray(prepared.rows["kept"]), np.asarray(prepared.rows["scores"])
    live = scores != 0
    assert kept.sum() == 2 == float(prepared.totals["kept"])
    assert scores[kept].max() < scores[live & ~kept].min()
    _, (grad, _) = cases.run(objective, x)
    dropped = np.take_along_axis(~kept, np.maximum(x.batch["pair_ids"], 0), axis=1)
    assert not np.asarray(grad)[dropped].any()
    assert np.asarray(grad)[~dropped].any()
