"""What has no weight or no number, through the train step, under every weighting and every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import weightings
from test_losses import METHODS as OF_LOSSES

from lm.model.interface import Outputs
from lm.model.trained import Trained
from lm.training.state import make_init
from lm.training.step import make_train_step
from objectives.losses import CROSS_ENTROPY, LOSSES
from objectives.weighted import weighted
from objectives.weighting import uniform


def bigram_model():
    """A model of two matrices, which compiles in no time."""

    def apply(params, inputs, products=None, taps=None):
        aux = {name: jnp.zeros(inputs.tokens.shape) for name in taps or {}}
        return Outputs(params["embedding"][inputs.tokens], aux, None)

    return tiny.model(width=8)._replace(
        init=lambda key: weightings.bigram(), apply=apply, head=lambda params: params["head"]
    )


def step_of(weighting, loss=CROSS_ENTROPY, accumulation=1):
    """A fresh state, and (batch, frozen) -> the state after a step and its metrics."""
    model, optimizer = bigram_model(), optax.sgd(0.1)
    references = {f"objective__references__{name}": "run" for name in loss.teachers}
    config = tiny.config(train__accumulation=accumulation, **references)
    objective = weighted(loss, weighting)
    init = make_init(model, optimizer, objective, False)
    state = init(jax.random.key(0))._replace(objective=weightings.state(weighting))
    schedule = optax.constant_schedule(0.1)
    step = jax.jit(
        make_train_step(model, optimizer, schedule, objective, config, None, {"run": model})
    )
    return state, lambda batch, frozen: step(state, batch, {"run": Trained(frozen)})


def check_skipped(before, after, metrics):
    assert metrics["skipped_steps"] == 1
    assert after.skipped == 1
    for name in ("trained", "optimizer", "objective"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def check_taken(before, after, metrics):
    assert metrics["skipped_steps"] == 0
    assert np.isfinite(metrics["loss"])
    assert np.any(after.trained.params["head"] != before.trained.params["head"])


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(weightings.METHODS, ("uniform", "rho1", "glow", "q_tuning"))
)
def test_a_weighting_skips_what_it_cannot_weigh(name):
    weighting, b, frozen = weightings.make(name), weightings.batch(), weightings.bigram(9)
    before, run = step_of(weighting, accumulation=2 if name in ("rho1", "glow") else 1)
    check_taken(before, *run(b, frozen))
    empty = {**b, "weights": jnp.zeros_like(b["weights"])}
    after, metrics = run(empty, frozen)
    check_skipped(before, after, metrics)
    assert metrics["weight_sum"] == 0  # Which the log of a skipped step shows.
    live = tuple(np.argwhere(b["weights"])[0])
    for key in weighting.references:
        where = live if key != "attention" else live[0]
        broken = {**b, key: b[key].at[where].set(jnp.nan)}
        after, metrics = run(broken, frozen)
        check_skipped(before, after, metrics)
        assert np.isnan(metrics["loss"])
    unknown = (-1, weightings.SAMPLES) if name == "glow" else (-1,)
    for sample in unknown if "sample_ids" in weighting.batch_keys else ():
        after, metrics = run({**b, "sample_ids": b["sample_ids"].at[live].set(sample)}, frozen)
        check_skipped(before, after, metrics)
        assert np.isnan(metrics["loss"])


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(OF_LOSSES, ("dice", "tempnet", "distillation", "uld"))
)
def test_a_loss_skips_a_batch_without_targets(name):
    loss, b, frozen = LOSSES[name](**OF_LOSSES[name]), weightings.batch(), weightings.bigram(9)
    b = b | tiny.stored_teacher(*b["tokens"].shape)
    before, run = step_of(uniform(), loss)
    check_taken(before, *run(b, frozen))
    after, metrics = run({**b, "weights": jnp.zeros_like(b["weights"])}, frozen)
    check_skipped(before, after, metrics)
    assert metrics["weight_sum"] == 0
    if loss.teachers:
        check_skipped(before, *run(b, jax.tree.map(lambda x: x * jnp.nan, frozen)))
