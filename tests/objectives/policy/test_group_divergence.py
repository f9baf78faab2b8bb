"""TW-GRPO with the weights of its released code, which have a gradient: against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
from scipy import special

from objectives.losses.base import CROSS_ENTROPY, Inputs, prediction_statistics
from objectives.policy import POLICY
from objectives.policy.group_divergence import group_divergence
from objectives.terms import minimise

VOCAB, WIDTH, ALPHA, BETA = 7, 4, 1.7, 0.3
NUMBERS = cases.draw(seed=4)
TOKENS = [(i, t) for i, n in enumerate(cases.LENGTHS) for t in range(n)]
_, BATCH, REFERENCES = cases.make_inputs(NUMBERS)
LIVE = np.asarray(BATCH["weights"]) != 0


def row_and_place(answer, token):
    for row, answers in enumerate(cases.ROWS):
        if answer in answers:
            before = answers[: answers.index(answer)]
            start = sum(cases.PROMPT + cases.LENGTHS[one] for one in before)
            return row, start + cases.PROMPT + token
    raise AssertionError(answer)


AT = np.array([row_and_place(*one) for one in TOKENS])


def states(seed=1):
    """(hidden [B, T, D] float64, NaN where nothing was drawn; head [D, V])."""
    rng = np.random.default_rng(seed)
    hidden = np.where(LIVE[..., None], rng.standard_normal((*LIVE.shape, WIDTH)), np.nan)
    return hidden, rng.standard_normal((WIDTH, VOCAB))


def dense_divergences(log_p):
    """{(group, place): divergence} of log-probabilities {(answer, place): [V]}."""
    found = {}
    for group in set(cases.GROUPS):
        members = [i for i, one in enumerate(cases.GROUPS) if one == group]
        for place in range(max(cases.LENGTHS[i] for i in members)):
            uniform = np.full(VOCAB, -np.log(VOCAB))
            each = np.stack([log_p.get((i, place), uniform) for i in members])
            apart = np.clip(each.mean(axis=0) - each, -11, 11)
            found[group, place] = np.mean(np.sum(np.exp(apart) - apart - 1, axis=-1))
    return found


def dense_loss(hidden, head, softcap=0.0):
    z = hidden[AT[:, 0], AT[:, 1]] @ head
    z = softcap * np.tanh(z / softcap) if softcap else z
    log_p = dict(zip(TOKENS, special.log_softmax(z, axis=-1), strict=True))
    apart = dense_divergences(log_p)
    total = 0.0
    for i, t in TOKENS:
        own = {name: values[i][t] for name, values in NUMBERS.items()}
        of_group = [x for (group, _), x in apart.items() if group == cases.GROUPS[i]]
        unit = (apart[cases.GROUPS[i], t] - min(of_group)) / (max(of_group) - min(of_group))
        p = log_p[i, t][int(own["targets"])]
        r = np.exp(p - own["behaviour_log_probability"])
        a = own["advantages"]
        x = p + own["reference_nll"]
        one = -min(r * a, np.clip(r, 0.8, 1.2) * a) + BETA * (np.exp(-x) - 1 + x)
        total += (1 + (ALPHA - 1) * unit) * one
    return total / len(TOKENS)


def loss(hidden, head, released, softcap, block_size):
    objective = POLICY["tw_grpo"](kl_coefficient=BETA, released=released)
    inputs = Inputs(hidden, head, BATCH["targets"], softcap=softcap, block_size=block_size)
    found = prediction_statistics(CROSS_ENTROPY, inputs)
    aux = {name: f(inputs, found, BATCH) for name, f in objective.measures.items()}
    prepared = objective.prepare(found, aux, BATCH, REFERENCES, (), 3)
    return minimise(objective.terms(found, aux, BATCH, prepared))[0]


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_value_and_gradient_of_the_released_weights(softcap):
    """In blocks that do not divide the vocabulary; members in several rows, some of them ended."""
    hidden, head = states()
    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3, 4))
    arrays = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    value, grads = run(*arrays, True, softcap, 3)
    assert value == pytest.approx(dense_loss(hidden, head, softcap), rel=1e-5)
    np.testing.assert_array_equal(np.asarray(grads[0])[~LIVE], 0.0)
    rng, off = np.random.default_rng(5), []
    _, fixed = run(*arrays, False, softcap, 3)
    for row, place in AT[rng.choice(len(AT), 6, replace=False)]:
        for column in range(WIDTH):
            sides = []
            for change in (1e-6, -1e-6):
                moved = hidden.copy()
                moved[row, place, column] += change
                sides.append(dense_loss(moved, head, softcap))
            slope = (sides[0] - sides[1]) / 2e-6
            assert grads[0][row, place, column] == pytest.approx(slope, rel=2e-3, abs=2e-5)
            off.append(abs(fixed[0][row, place, column] - slope))
    assert max(off) > 1e-3  # negative control: weights without a gradient
    _, plain = run(*arrays, True, softcap, 0)
    for one, other in zip(grads, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_divergence_by_hand():
    """The numbers of the released function, whose gradient they keep, and of equal members."""
    p = np.array([[0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.5, 0.5]], np.float32)
    numbers = jnp.array([[1, 1, 2, 2]])
    batch = {"weights": jnp.ones((1, 4)), "segment_ids": numbers, "targets": 0 * numbers}
    batch["group_ids"] = 0 * numbers

    def divergence(log_p_TV):
        inputs = Inputs(log_p_TV[None], jnp.eye(2), 0 * numbers, block_size=1)
        found = group_divergence(inputs, prediction_statistics(CROSS_ENTROPY, inputs), batch)[0]
        return found[0], found

    run = jax.jit(jax.grad(divergence, has_aux=True))
    slopes, found = run(jnp.log(p))
    np.testing.assert_allclose(found, [0.182179, 0, 0.182179, 0], atol=1e-6)
    assert np.abs(slopes[::2]).min() > 0.01
    np.testing.assert_allclose(slopes[1::2], 0.0, atol=1e-7)
    np.testing.assert_array_equal(run(jnp.log(p[:1].repeat(4, axis=0)))[1], 0.0)
