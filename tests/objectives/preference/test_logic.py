"""The symbolic forms are those of the losses, and the losses are each other's limits."""

import numpy as np
import preference_cases as cases
import pytest
import tiny

from objectives.preference import PREFERENCE
from objectives.preference.dpo import smoothed
from objectives.preference.logic import FORMS, Pair

P = PREFERENCE
LENGTHS = ((3, 2),)
BETA, GAMMA = 0.7, 0.4


def one_pair(seed=0):
    return cases.case(seed, LENGTHS)


def value_of(objective, one):
    """The term "loss" and all terms."""
    x = cases.make_inputs(objective, one, rows=((0,),))
    (value, (terms, _)), grads = cases.run(objective, x)
    return float(value), {k: float(v) for k, v in terms.items()}, grads


def pair(one):
    log_p, nll = one.log_p, one.known["reference_nll"]
    sums = (log_p.chosen, log_p.rejected, nll.chosen, nll.rejected)
    w, other, r_w, r_l = (float(x[0].sum()) for x in sums)
    return Pair(w, other, -r_w, -r_l, *LENGTHS[0])


def share(a, b):
    """-log of a / (a + b), and b / (a + b)."""
    return np.logaddexp(a, b) - a, np.exp(b - np.logaddexp(a, b))


# Name of a form -> (objective, what its loss is of log a and log b, the other form it adds up with)
LOSSES = {
    "cpo": (P["cpo"](BETA), lambda a, b: share(a, b)[0]),
    "dpo": (P["dpo"](BETA), lambda a, b: share(a, b)[0]),
    "ipo": (P["ipo"](BETA), lambda a, b: (a - b - 1 / (2 * BETA)) ** 2),
    "simpo": (P["simpo"](BETA, GAMMA), lambda a, b: share(a, b)[0]),
    "orpo": (P["orpo"](BETA), lambda a, b: share(a, b)[0]),
    "npo": (P["npo"](BETA), lambda a, b: 2 / BETA * share(a, b)[0]),
    "sim_npo": (P["sim_npo"](BETA, GAMMA), lambda a, b: 2 / BETA * share(a, b)[0]),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(LOSSES, ("dpo", "orpo", "npo")))
@pytest.mark.parametrize("seed", [0, 1])
def test_a_form_is_that_of_its_loss(name, seed):
    objective, loss = LOSSES[name]
    one = one_pair(seed)
    extra = {"simpo": GAMMA, "sim_npo": GAMMA}.get(name, 0.0)
    a, b = FORMS[name].odds(pair(one), BETA, extra)
    assert value_of(objective, one)[1]["loss"] == pytest.approx(loss(a, b), rel=1e-5)
    assert loss(b, a) != pytest.approx(loss(a, b), rel=1e-3)


@pytest.mark.parametrize(("name", "which"), [("bco", 0), ("kto", 1)])
def test_a_form_of_single_answers_is_that_of_its_loss(name, which):
    options = {"reference_point": "zero"} if name == "kto" else {"mean_over": "answers"}
    one = one_pair()
    _, terms, _ = value_of(P[name](BETA, **options), one)
    extra = terms.get("delta", 0.0)
    both = [
        share(*FORMS[f"{name}, {side}"].odds(pair(one), BETA, extra))[which]
        for side in ("wanted", "unwanted")
    ]
    assert terms["loss"] == pytest.approx(np.mean(both), rel=1e-5)


def test_every_form_is_tested_and_in_words():
    tested = {*LOSSES, *(f"{n}, {s}" for n in ("bco", "kto") for s in ("wanted", "unwanted"))}
    assert tested == set(FORMS)
    assert {name.partition(",")[0] for name in FORMS} <= set(PREFERENCE)
    assert FORMS["cpo"].margin == "log(p_w^beta) - log(p_l^beta)"


def test_simpo_without_a_margin_is_dpo_by_token_without_a_reference():
    one = one_pair()
    parent = P["dpo"](BETA, reference_free=True, length_normalised=True)
    value, _, (grad, _) = value_of(P["simpo"](BETA, 0.0), one)
    wanted, _, (its_grad, _) = value_of(parent, one)
    assert value == wanted
    np.testing.assert_array_equal(grad, its_grad)


def test_cpo_is_dpo_without_a_reference_and_a_likelihood():
    one = one_pair()
    value, terms, _ = value_of(P["cpo"](BETA, 0.6), one)
    wanted = value_of(P["dpo"](BETA, reference_free=True), one)[0]
    assert value == pytest.approx(wanted + 0.6 * terms["chosen_nll"], rel=1e-6)
    assert terms["chosen_nll"] == pytest.approx(-one.log_p.chosen[0].mean(), rel=1e-6)


def test_the_robust_loss_is_right_in_the_mean_over_flipped_labels():
    h, eps = np.linspace(-4, 4, 9), 0.3
    right, wrong = (smoothed(x, eps, robust=True) for x in (h, -h))
    np.testing.assert_allclose((1 - eps) * right + eps * wrong, smoothed(h), rtol=1e-5)
    biased = (1 - eps) * smoothed(h, eps) + eps * smoothed(-h, eps)
    assert np.abs(biased - smoothed(h)).max() > 0.1


def at_the_reference():
    """The policy is the reference: all margins are 0."""
    one = one_pair()
    return one._replace(log_p=one.known["reference_nll"].map(np.negative))


def test_ipo_begins_where_dpo_does():
    """At the reference d ipo = (2 / beta^2) d dpo, to the first order in the margin."""
    ipo, dpo = (value_of(P[name](BETA), at_the_reference()) for name in ("ipo", "dpo"))
    assert ipo[0] == pytest.approx(1 / (2 * BETA) ** 2)
    np.testing.assert_allclose(ipo[2][0], 2 / BETA**2 * dpo[2][0], rtol=1e-5)
    away, other = (value_of(P[name](BETA), one_pair()) for name in ("ipo", "dpo"))
    assert np.abs(away[2][0] - 2 / BETA**2 * other[2][0]).max() > 0.1


def test_npo_is_dpo_of_a_chosen_answer_that_the_policy_has_left_alone():
    one = one_pair()
    still = one.known["reference_nll"].chosen
    still = one._replace(log_p=one.log_p._replace(chosen=[-x for x in still]))
    npo = value_of(P["npo"](BETA, alpha=0.0), one)
    assert npo[0] * BETA / 2 == pytest.approx(value_of(P["dpo"](BETA), still)[0], rel=1e-5)


def test_npo_with_a_small_beta_is_gradient_ascent():
    one = one_pair()
    x = cases.make_inputs(P["npo"](), one, rows=((0,),))
    rejected = np.asarray((x.batch["sides"] == -1) & (x.batch["weights"] != 0))
    grad = np.asarray(value_of(P["npo"](1e-4, alpha=0.0), one)[2][0])
    np.testing.assert_allclose(grad[rejected], 1.0, rtol=1e-3)
    assert (
        np.abs(np.asarray(value_of(P["npo"](2.0, alpha=0.0), one)[2][0])[rejected] - 1).max() > 0.1
    )


def test_a_conservative_loss_without_doubt_is_dpo():
    h = np.linspace(-3, 3, 7, dtype=np.float32)
    np.testing.assert_array_equal(smoothed(h, 0.0), smoothed(h))
    assert np.abs(smoothed(h, 0.1) - smoothed(h)).max() > 0.1
