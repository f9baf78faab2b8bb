"""The distribution that a policy gradient learns: that of the sampler, with its temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
import tiny

from lm.errors import InputError
from lm.model.trained import Trained
from lm.references.sources import EMA
from lm.training.forward import make_prediction_statistics, make_training_statistics
from lm.training.gradients import gather_references, make_gradients
from lm.training.make_objective import make_objective
from lm.training.step import make_reference_models
from objectives.losses import CROSS_ENTROPY
from objectives.losses.base import Inputs, training_statistics
from objectives.policy import POLICY

TEMPERATURE = 1.7


@pytest.mark.parametrize("softcap", tiny.mostly_slow([0.0, 2.0], quick=[2.0]))
def test_tempered_statistics(softcap):
    """Capped first, then divided; the gradient in blocks is that of plain differentiation."""
    loss = POLICY["grpo"](sampling_temperature=TEMPERATURE).loss
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 11))
    targets = rng.integers(0, 11, (2, 3))

    def total(hidden, head, block_size):
        x = Inputs(hidden, head, jnp.asarray(targets), softcap=softcap, block_size=block_size)
        x = x._replace(temperature=loss.temperature)
        found = training_statistics(loss, x, jnp.ones((2, 3)))
        return jnp.sum(found.nll) + 0.3 * jnp.sum(found.entropy), found

    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
    (_, found), grads = run(*arrays, 4)
    _, plain = run(*arrays, 0)
    for one, other in zip(grads, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    z = hidden @ head
    z = (softcap * np.tanh(z / softcap) if softcap else z) / TEMPERATURE
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_probability, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5)


def test_at_temperature_one_the_loss_is_cross_entropy():
    for name, factory in POLICY.items():
        if name == "hapo":
            factory = functools.partial(factory, temperature_tau=0.0)
        if name != "ppo":
            assert factory().loss is CROSS_ENTROPY, name
            assert factory(sampling_temperature=2.0).loss.temperature == 2.0, name
    assert POLICY["ppo"](sampling_temperature=2.0).loss.temperature == 2.0


def batch_of_answers():
    """A toy batch whose second halves were drawn."""
    batch = tiny.batch(uneven=False)
    weights = (batch["positions"] > 1).astype(jnp.float32)
    shape = weights.shape
    rng = np.random.default_rng(3)
    sign = np.where(np.asarray(batch["segment_ids"]) == 1, 1.0, -0.5)
    return batch | {
        "weights": weights,
        "advantages": jnp.asarray(sign, jnp.float32) * weights,
        "rewards": jnp.asarray(sign, jnp.float32) * weights,
        "behaviour_log_probability": jnp.asarray(-3 * rng.random(shape), jnp.float32) * weights,
        "group_ids": jnp.zeros(shape, jnp.int32),
    }


def test_a_model_and_its_references_are_tempered_alike():
    """So that an average that is the model is at no distance; the evaluated one is at 1."""
    model, batch = tiny.model(logit_softcap=5.0, layers=1), batch_of_answers()
    trained = Trained(tiny.params(model))
    objective = POLICY["grpo"](kl_coefficient=0.1, sampling_temperature=TEMPERATURE)
    config = tiny.config()
    with config.unlocked():
        config.objective.references.reference_nll = EMA
    measure = make_training_statistics(model, 16, objective)

    def of_reference(objective, trained):
        models = make_reference_models(model, objective, config, None, None)
        models = models(trained, {EMA: trained})
        return gather_references(objective.references, batch, models, 1)["reference_nll"]

    @jax.jit
    def compare(trained):
        evaluated = make_prediction_statistics(model, 16, None, objective.loss)(trained, batch)
        # Negative control: at the temperature 1 the reference is another one.
        plain = of_reference(POLICY["grpo"](kl_coefficient=0.1), trained)
        found = measure(trained, batch)[0].nll
        return found, of_reference(objective, trained), plain, evaluated.nll

    live = np.asarray(batch["weights"]) != 0
    found, reference, plain, evaluated = (x[live] for x in compare(trained))
    np.testing.assert_allclose(reference, found, rtol=1e-5)
    np.testing.assert_allclose(evaluated, plain, rtol=1e-5)
    assert np.abs(plain - found).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_values_are_learned_through_the_model(shared):
    """A value head is trained beside the model, and alone where the states are not shared."""
    model, batch = tiny.model(layers=1), batch_of_answers()
    objective = POLICY["ppo"](shared=shared, value_coefficient=2.0)
    head = objective.loss.init(jax.random.key(0), tiny.VOCAB, 32)
    head["value"] += 0.1
    trained = Trained(tiny.params(model), loss=head)
    batch = batch | {"rewards": batch["rewards"] + 3}
    silent = objective._replace(
        terms=lambda *x, of=objective.terms: {
            name: term._replace(coefficient=2.0 * (name == "value_loss"))
            for name, term in of(*x).items()
        }
    )
    measure = make_training_statistics(model, 16, silent)
    grads, metrics, _ = jax.jit(make_gradients(measure, silent))(trained, batch, (), 0)
    assert metrics["value_loss"] > 1
    assert np.abs(grads.loss["value"]).max() > 0
    assert any(np.any(x) for x in jax.tree.leaves(grads.params)) == shared


def test_the_temperature_is_that_of_the_rollouts():
    config = tiny.config(objective__name="grpo", rollouts__temperature=0.0)
    with pytest.raises(InputError, match=r"rollouts.temperature=0.0 must be above 0"):
        make_objective(config)


def test_cases_are_of_the_keys_that_are_declared():
    _, batch, _ = cases.make_inputs(cases.draw())
    for name, objective in cases.METHODS.items():
        assert set(objective.batch_keys) <= set(batch), name
