"""Whole policy gradients: the expected one of an enumerated policy, and TRL's losses."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
import tiny

from objectives.policy import POLICY

HERE = Path(__file__).parent
EXACT = ["reinforce", "grpo", "cispo", "minpro", "ctpo"]


@pytest.mark.parametrize("name", tiny.mostly_slow(EXACT, quick=["grpo"]))
def test_the_expected_gradient_is_that_of_the_expected_reward(name):
    """A policy of two tokens and two steps, all its answers weighted by their probabilities."""
    settings = {
        "reinforce": {"surrogate": "reinforce"},
        "grpo": {"surrogate": "ppo"},
        "cispo": {"surrogate": "cispo"},
        "minpro": {"surrogate": "cispo", "ratio": "prefix_min"},
        "ctpo": {"ratio": "cumulative", "clip": "position"},
    }[name]
    objective = POLICY["policy"](advantage="rewards", aggregation="sequence_sum", **settings)
    trajectories = np.array(list(itertools.product((0, 1), repeat=2)))
    rewards = np.array([0.3, -1.0, 2.0, 0.7])
    logits = np.array([0.4, -0.3, 0.8])  # Of the first token, and of the second after each.

    def log_p(logits):
        def of(logit, token):
            return jax.nn.log_sigmoid(jnp.where(token == 1, logit, -logit))

        first, second = trajectories.T
        return jnp.stack([of(logits[0], first), of(logits[1 + first], second)], axis=1)

    with jax.enable_x64():
        logits = jnp.asarray(logits)
        old = log_p(logits)
        p = jnp.exp(old.sum(axis=1))
        shape = (4, 2)
        batch = {
            "weights": jnp.ones(shape),
            "segment_ids": jnp.ones(shape, jnp.int32),
            "targets": jnp.asarray(trajectories),
            "behaviour_log_probability": old,
            "group_ids": jnp.zeros(shape, jnp.int32),
            "rewards": jnp.broadcast_to(rewards[:, None], shape),
            # The mean over four answers becomes the expectation.
            "advantages": jnp.broadcast_to((4 * p * rewards)[:, None], shape),
        }

        def loss(logits):
            read = {"log_p": log_p(logits), "entropy": jnp.ones(shape)}
            return cases.value_and_terms(objective, read, batch, {})[0]

        expected = jax.grad(lambda x: jnp.sum(jnp.exp(log_p(x).sum(axis=1)) * rewards))(logits)
        np.testing.assert_allclose(
            jax.jit(jax.grad(loss))(logits), -expected, rtol=1e-7, atol=1e-12
        )


# Name of a golden -> the objective.
GOLDENS = {
    "grpo": POLICY["grpo"](),
    "grpo kl": POLICY["grpo"](kl_coefficient=0.3),
    "grpo dual": POLICY["grpo"](dual_clip=1.3),
    "gspo": POLICY["gspo"](clip_low=0.02, clip_high=0.03),
    "bnpo": POLICY["grpo"](aggregation="token_mean"),
    "dr_grpo": POLICY["dr_grpo"](length=9),
    "dapo": POLICY["dapo"](),
    "dapo entropy": POLICY["policy"](entropy_coefficient=0.1),
    "luspo": POLICY["policy"](
        ratio="sequence", aggregation="sequence_sum", clip_low=0.02, clip_high=0.03
    ),
    "cispo": POLICY["cispo"](clip_high=0.15),
    "sapo": POLICY["sapo"](),
}


def golden_inputs(record):
    lengths = [len(x) for x in record["log_p"]]
    numbers = {name: [np.array(x) for x in record[name]] for name in ("log_p", "entropy")}
    numbers |= {
        "behaviour_log_probability": [np.array(x) for x in record["behaviour"]],
        "reference_nll": [-np.array(x) for x in record["reference"]],
        "advantages": [np.full(n, a) for n, a in zip(lengths, record["advantages"], strict=True)],
        "value": [np.zeros(n) for n in lengths],
        "targets": [np.zeros(n) for n in lengths],
        "group_ids": [np.zeros(n) for n in lengths],
        "rewards": [np.zeros(n) for n in lengths],
    }
    return cases.make_inputs(numbers, ((0, 1), (2,), (3, 4), (5,), (), (), (), ()))


def compare(record):
    inputs = golden_inputs(record["given"])
    drawn = np.asarray(inputs[1]["weights"]) != 0
    assert set(GOLDENS) == set(record["found"])
    values = set()
    for name, expected in record["found"].items():
        (value, _), grads = cases.run(GOLDENS[name], inputs)
        assert value == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6), name
        for key in ("log_p", "entropy"):
            wanted = np.concatenate(expected[key])
            np.testing.assert_allclose(
                np.asarray(grads[key])[drawn], wanted, rtol=1e-4, atol=1e-6, err_msg=name
            )
        values.add(round(expected["loss"], 6))
    # Negative control: no two losses are the same number.
    assert len(values) == len(GOLDENS)


def test_losses_and_gradients_are_those_of_trl():
    compare(json.loads((HERE / "goldens" / "trl_policy.json").read_text()))


@pytest.mark.slow
@pytest.mark.skipif("NIBBLE_ORACLES" not in os.environ, reason="no environment with trl")
def test_goldens_are_those_of_trl(tmp_path):
    path = tmp_path / "trl_policy.json"
    script = HERE / "make_policy_goldens.py"
    subprocess.run([os.environ["NIBBLE_ORACLES"], script, path], check=True, timeout=600)
    compare(json.loads(path.read_text()))
