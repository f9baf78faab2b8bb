"""Objectives of preferences against their definitions, published toy values and TRL."""

import json
import math
import os
import subprocess
from pathlib import Path

import dense_preference as dense
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest
import tiny

from objectives import OBJECTIVES
from objectives.preference import PREFERENCE
from objectives.preference.ches import ches
from objectives.preference.treg import token_rewards
from objectives.weighting.critical_token import contrast_probability

HERE = Path(__file__).parent
# Name -> (objective, its definition).
DEFINED = {
    "dpo": (PREFERENCE["dpo"](), dense.dpo),
    "dpo conservative": (PREFERENCE["dpo"](0.3, 0.2), dense.conservative),
    "dpo robust": (PREFERENCE["dpo"](0.3, 0.2, robust=True), dense.robust),
    "dpo plain": (
        PREFERENCE["dpo"](0.3, reference_free=True, length_normalised=True),
        dense.plain,
    ),
    "ipo": (PREFERENCE["ipo"](0.2), dense.ipo),
    "kto": (PREFERENCE["kto"](0.3, 1.3, 0.6), dense.kto),
    "orpo": (PREFERENCE["orpo"](0.4), dense.orpo),
    "simpo": (PREFERENCE["simpo"](), dense.simpo),
    "cpo": (PREFERENCE["cpo"](alpha=0.7), dense.cpo),
    "tgdpo": (PREFERENCE["tgdpo"](), dense.tgdpo),
    "treg": (PREFERENCE["treg"](), dense.treg),
    "cdpo": (PREFERENCE["cdpo"](), dense.cdpo),
    "cdpo released": (
        PREFERENCE["cdpo"](only_rejected=False, per_position=True),
        dense.cdpo_places,
    ),
    "sparse_po": (PREFERENCE["sparse_po"](), dense.sparse_po),
    "tars": (PREFERENCE["tars"](), dense.dpo),
    "ches_dpo": (PREFERENCE["ches_dpo"](), dense.dpo),
    "bco": (PREFERENCE["bco"](0.2), dense.bco),
    "bco answers": (
        PREFERENCE["bco"](0.2, "answers", match_prompts=True),
        lambda x, at: dense.bco(x, at, sides=False, matched=True),
    ),
    "npo": (PREFERENCE["npo"](gamma=0.8, alpha=0.6), dense.npo),
    "npo kl": (PREFERENCE["npo"](retain="kl"), dense.npo_kl),
    "sim_npo": (PREFERENCE["sim_npo"](delta=0.3), dense.sim_npo),
}


def finite_differences(function, one, step=1e-5):
    """The gradient in log p and in the divergence, each as `Answers`."""
    grads = [array.map(np.zeros_like) for array in (one.log_p, one.known["divergence"])]
    frozen = cases.Case(one.log_p.map(np.copy), one.known)
    for grad, array in zip(grads, (one.log_p, one.known["divergence"]), strict=True):
        for side in ("chosen", "rejected", "mismatched"):
            for into, answer in zip(getattr(grad, side), getattr(array, side), strict=True):
                for token in range(len(answer)):
                    value = answer[token]
                    answer[token] = value + step
                    above = function(one, frozen)
                    answer[token] = value - step
                    below = function(one, frozen)
                    answer[token] = value
                    into[token] = (above - below) / (2 * step)
    return grads


def test_every_objective_is_defined_here():
    assert {name.partition(" ")[0] for name in DEFINED} == set(PREFERENCE)
    assert {"weighted"} | set(PREFERENCE) <= set(OBJECTIVES)


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(DEFINED, ("dpo", "kto", "orpo", "tgdpo", "cdpo released", "bco", "npo")),
)
def test_value_and_gradient_are_those_of_the_definition(name):
    objective, definition = DEFINED[name]
    one = cases.case()
    x = cases.make_inputs(objective, one)
    (value, (terms, _)), grads = cases.run(objective, x)
    assert float(value) == pytest.approx(definition(one, one), rel=2e-6)
    mismatched = "mismatched_ids" in objective.batch_keys
    for grad, wanted in zip(grads, finite_differences(definition, one), strict=True):
        wanted = cases.place(wanted, mismatched=mismatched, other=0.0)
        np.testing.assert_allclose(grad, wanted, atol=2e-6)
    assert all(np.isfinite(float(x)) for x in terms.values())
    # A definition with another number is seen.
    other = cases.case(seed=1)
    assert definition(other, other) != pytest.approx(float(value), rel=1e-3)


def one_pair(lists, **known):
    """A case of one pair; lists are (chosen, rejected) numbers."""

    def answers(two):
        return cases.Answers([np.array(two[0])], [np.array(two[1])], [np.array(two[0])])

    zero = ([0.0] * len(lists[0]), [0.0] * len(lists[1]))
    found = {name: answers(zero) for name in (*cases.STORED, "divergence")}
    return cases.Case(answers(lists), found | {name: answers(x) for name, x in known.items()})


def loss_of(objective, one):
    (value, (terms, _)), _ = cases.run(objective, cases.make_inputs(objective, one, rows=((0,),)))
    return float(value), terms


RATIOS = ([0.1, 0.2], [-0.3, 0.1])


def test_toy_values_of_dpo_and_tgdpo():
    assert loss_of(PREFERENCE["dpo"](), one_pair(RATIOS))[0] == pytest.approx(0.66846, abs=1e-5)
    equal = one_pair(([0.1, 0.2], [0.3]))
    assert loss_of(PREFERENCE["dpo"](), equal)[0] == pytest.approx(math.log(2), abs=1e-6)
    # rho = log p_reward - log p_reference = -reward_nll here.
    guided = one_pair(RATIOS, reward_nll=([-0.5, 0.2], [0.4, -0.3]))
    value, terms = loss_of(PREFERENCE["tgdpo"](), guided)
    assert value == pytest.approx(0.66807, abs=1e-5)
    assert float(terms["margin"]) == pytest.approx(0.0508, abs=1e-5)


def test_toy_values_of_the_rewards_of_tokens():
    found = token_rewards(-jnp.log(jnp.array([0.6, 0.2])), -jnp.log(jnp.array([0.3, 0.4])))
    np.testing.assert_allclose(found, [0.166667, -0.166667], atol=1e-5)
    assert float(token_rewards(jnp.float32(1.3), jnp.float32(1.3))) == 0


def test_toy_values_of_bco():
    # Rewards .4 and -.2; a state whose next mean is .1: it has seen one reward of .1.
    one = one_pair(([0.4], [-0.2]))
    objective = PREFERENCE["bco"](beta=1.0)
    value, terms = loss_of(objective, one)
    assert float(terms["delta"]) == pytest.approx(0.1)
    assert value == pytest.approx(1.10871, abs=1e-5)
    assert loss_of(PREFERENCE["dpo"](beta=1.0), one)[0] == pytest.approx(0.437488, abs=1e-5)


def test_toy_values_of_critical_tokens():
    p = contrast_probability(
        jnp.array([[2.0, 0.0]] * 2), jnp.array([[0.0, 2.0]] * 2), jnp.array([0, 1])
    )
    np.testing.assert_allclose(p, [0.997527, 0.002473], atol=1e-5)
    one = one_pair(([0.0], [0.5, 0.5]), contrast_probability=([0.3], [float(x) for x in p]))
    _, terms = loss_of(PREFERENCE["cdpo"](beta=1.0), one)
    assert float(terms["reward_rejected"]) == pytest.approx(0.5 * (0.002473 + 0.997527), abs=1e-5)


@pytest.mark.parametrize(("ratio", "loss", "share"), [(0, 13.862944, 1), (-1, 12.887933, 0.950042)])
def test_toy_values_of_npo(ratio, loss, share):
    objective = PREFERENCE["npo"](alpha=0.0)
    x = cases.make_inputs(objective, one_pair(([0.0], [0.0, ratio])), rows=((0,),))
    (value, _), (grad, _) = cases.run(objective, x)
    assert float(value) == pytest.approx(loss, abs=1e-5)
    # Gradient ascent has the gradient 1 in log p of every token.
    np.testing.assert_allclose(grad[x.batch["sides"] == -1], [0, 0, share, share], atol=1e-5)


@pytest.mark.parametrize(("normalised", "score"), [(False, 2.0), (True, 0.5)])
def test_toy_values_of_ches(normalised, score):
    batch = cases.make_batch(((2, 2),), ((0,),))
    states = np.full((*batch["weights"].shape, 2), np.nan, np.float32)
    states[batch["weights"] != 0] = [[1, 0], [0, 1], [1, 1], [2, 0]]
    found = ches(batch, jnp.asarray(states), normalised)
    np.testing.assert_allclose(found[0], [score] + [0] * (found.shape[1] - 1), atol=1e-6)
    states[batch["weights"] != 0] = [[1, 0], [0, 1]] * 2
    assert float(ches(batch, jnp.asarray(states), normalised)[0, 0]) == 0


def golden_case(record):
    given = {k: [np.array(x) for x in v] for k, v in record["given"].items()}
    log_p = cases.Answers(*(given[k] for k in ("chosen", "rejected", "mismatched")))
    nll = cases.Answers(
        *([-x for x in given[f"reference_{k}"]] for k in ("chosen", "rejected", "mismatched"))
    )
    zero = log_p.map(np.zeros_like)
    known = dict.fromkeys((*cases.STORED, "divergence"), zero) | {"reference_nll": nll}
    return cases.Case(log_p, known)


OF_TRL = {
    "dpo": PREFERENCE["dpo"](0.3),
    "dpo robust": PREFERENCE["dpo"](0.3, 0.2, robust=True),
    "dpo length_normalised": PREFERENCE["dpo"](0.3, length_normalised=True),
    "ipo length_normalised": PREFERENCE["ipo"](0.3, length_normalised=True),
    "kto": PREFERENCE["kto"](0.3, 1.5, 0.7),
    "kto zero": PREFERENCE["kto"](0.3, 1.5, 0.7, reference_point="zero"),
    "orpo": PREFERENCE["orpo"](0.3),
    "simpo": PREFERENCE["simpo"](0.3, 0.4, 0.2),
    "cpo": PREFERENCE["cpo"](0.3, 0.6, 0.2),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(OF_TRL, ("dpo", "kto", "simpo")))
def test_losses_and_gradients_are_those_of_trl(name):
    record = json.loads((HERE / "goldens" / "trl.json").read_text())
    one, wanted = golden_case(record), record["found"][name]
    objective, rows = OF_TRL[name], ((0, 1), (2, 3), (4,))
    (value, _), (grad, _) = cases.run(objective, cases.make_inputs(objective, one, rows))
    assert float(value) == pytest.approx(wanted["loss"], rel=2e-6)
    sides = [[np.array(x) for x in wanted[k]] for k in ("chosen", "rejected")]
    grads = cases.Answers(*sides, [0 * x for x in one.log_p.mismatched])
    mismatched = "mismatched_ids" in objective.batch_keys
    np.testing.assert_allclose(
        grad, cases.place(grads, rows, mismatched, other=0.0), rtol=2e-5, atol=1e-7
    )
    others = [found["loss"] for key, found in record["found"].items() if key != name]
    assert all(other != pytest.approx(wanted["loss"], rel=1e-4) for other in others)


@pytest.mark.slow
@pytest.mark.skipif("NIBBLE_ORACLES" not in os.environ, reason="no environment with trl")
def test_goldens_are_what_trl_gives_now(tmp_path):
    oracle, path = os.environ["NIBBLE_ORACLES"], tmp_path / "trl.json"
    if subprocess.run([oracle, "-c", "import trl"], check=False, capture_output=True).returncode:
        pytest.skip("no trl in the environment")
    script = HERE / "make_preference_goldens.py"
    subprocess.run([oracle, script, path], check=True, timeout=600, capture_output=True)
    found, stored = (json.loads(p.read_text()) for p in (path, HERE / "goldens" / "trl.json"))
    assert found["given"] == stored["given"]
    assert found["found"].keys() == stored["found"].keys()
    for name, one in found["found"].items():
        assert one["loss"] == pytest.approx(stored["found"][name]["loss"], rel=1e-9), name
