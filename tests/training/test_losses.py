"""Losses in the training step: the whole batch decides, however it is split, and all compose."""

import inspect
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings

from configs import base
from lm.errors import InputError
from lm.evaluation import sampling
from lm.model.interface import Outputs, Tokens
from lm.model.trained import Trained
from lm.parallel.mesh import make_mesh, put_batch
from lm.training import experiment
from lm.training.forward import (
    ReferenceModel,
    make_forward,
    make_training_statistics,
    token_keys,
)
from lm.training.gradients import make_gradients
from lm.training.step import make_eval_step, make_train_step
from objectives import OBJECTIVES
from objectives.losses import LOSSES, Inputs, Loss, Teacher, training_statistics
from objectives.vocabulary import products
from objectives.weighted import weighted
from objectives.weighting import chain, uniform

FIRST = jnp.zeros((), jnp.int32)

METHODS = {
    "cross_entropy": {},
    "dice": {"alpha": 0.5},
    "tversky": {},
    "inverted_hinge": {},
    "one_token_rollout": {"samples": 4, "temperature": 1.3},
    "tempnet": {"width": 5, "rho": 1.0},
    "harmonic": {"distance": "mahalanobis"},
    "block_distillation": {},
    "distillation": {"divergence": "jensen_shannon", "share": 0.7},
    "nkd": {"temperature": 1.5},
    "pld": {"top": 5},
    "dhkd": {"alpha": 0.1},
    "nd": {},
    "dac_kl": {"lower": 0.01, "upper": 0.5},
    "align_distil": {},
    "top_k_distillation": {"share": 0.7},
    "uld": {"coefficient": 0.5},
}
# A weighting that reads the statistics of the whole batch, and passes a gradient.
BOTH = ("focal", "uskd")


def bigram(params, batch):
    """Hidden states, NaN where the batch's "poison" is, and head of `weightings.bigram`."""
    poison = batch.get("poison", jnp.zeros(()))[..., None]
    return params["embedding"][batch["tokens"]] + poison, params["head"]


def statistics_of(loss: Loss):
    """Of a bigram model, as `make_training_statistics` gives those of a Transformer."""

    def statistics(trained, batch, teachers=MappingProxyType({})):
        hidden, head = bigram(trained.params, batch)
        stored = {name: batch[name] for name in loss.batch_keys}
        x = Inputs(hidden, head, batch["targets"], trained.loss, keys=batch.get("keys"))
        x = x._replace(stored=stored)
        for name, teacher in teachers.items():
            outputs, its_head = teacher.forward(teacher.trained, batch)
            one = Teacher(outputs.hidden, its_head, products())
            x = x._replace(teachers={**x.teachers, name: one})
        return training_statistics(loss, x, batch["weights"]), {}

    return statistics


def compute(loss: Loss, accumulation=1, names=BOTH, z_loss=0.1):
    """A jitted batch -> (gradients, metrics) of a bigram model."""
    weighting = chain(*map(weightings.make, names)) if names else uniform()
    gradients = make_gradients(statistics_of(loss), weighted(loss, weighting, z_loss), accumulation)
    trained = Trained(weightings.bigram(), loss=loss.init(jax.random.key(5), tiny.VOCAB, 8))
    models = {
        name: ReferenceModel(
            lambda *of: (Outputs(bigram(*of)[0], {}, None), bigram(*of)[1]),
            None,
            0.0,
            weightings.bigram(seed=9 + i),
        )
        for i, name in enumerate(loss.teachers)
    }
    return jax.jit(
        lambda b: gradients(trained, b, weighting.init(), FIRST, models)[:2],
    )


def batch(rows=8, length=12):
    b = weightings.batch(rows, length)
    b |= {"poison": jnp.zeros((rows, length)), "keys": token_keys(3, FIRST, (rows, length))}
    return b | tiny.stored_teacher(rows, length)


def padded(b, rows=4, columns=3):
    """More rows and columns of weight 0, with NaN hidden states and the keys of that shape."""
    more = {
        name: jnp.pad(
            x,
            [(0, rows), (0, columns), (0, 0)][: x.ndim],
            constant_values=jnp.nan if name == "poison" or name.startswith("teacher_log") else 0,
        )
        for name, x in b.items()
        if name != "keys"
    }
    return more | {"keys": token_keys(3, FIRST, more["tokens"].shape)}


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.nanmax(np.abs(y)) + 1e-9
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)


@pytest.mark.parametrize("name", tiny.mostly_slow(METHODS, ("tempnet",)))
def test_the_order_the_split_and_the_scale_of_the_batch_change_nothing(name):
    """With a weighting of batch statistics that passes a gradient, and a z-loss."""
    loss, b = LOSSES[name](**METHODS[name]), batch()
    run = compute(loss)
    grads, metrics = run(b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    assert "nll" in metrics

    order = np.random.default_rng(1).permutation(8)
    close(run({k: x[order] for k, x in b.items()}), (grads, metrics))

    scaled_grads, scaled = run({**b, "weights": 7 * b["weights"]})
    close(scaled_grads, grads)
    close(scaled, {**metrics, "weight_sum": 7 * metrics["weight_sum"]})

    close(compute(loss, accumulation=4)(padded(b)), (grads, metrics))

    mesh = make_mesh({"data": 4, "fsdp": 1, "tensor": 1, "sequence": 2})
    rows = jax.NamedSharding(mesh, jax.P("data"))
    cells = jax.NamedSharding(mesh, jax.P("data", "sequence"))
    spread = {k: jax.device_put(x, cells if x.ndim > 1 else rows) for k, x in b.items()}
    with jax.set_mesh(mesh):
        close(run(spread), (grads, metrics))


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(METHODS, ("dice", "tempnet", "distillation", "uld"))
)
def test_an_unweighted_loss_survives_accumulation(name):
    """Without statistics of the batch, each micro-batch is on its own but for the denominators."""
    loss, b = LOSSES[name](**METHODS[name]), batch()
    close(compute(loss, accumulation=2, names=())(b), compute(loss, names=())(b))


@pytest.mark.slow
def test_self_knowledge_is_that_of_the_whole_batch():
    """Its weight of the target has a mean over the batch, beside terms that have none."""
    objective, b = OBJECTIVES["self_knowledge"](top=9, mu=0.1), batch()
    params = objective.loss.init(jax.random.key(5), tiny.VOCAB, 8)
    trained = Trained(weightings.bigram(), loss=params)

    def make(accumulation):
        run = make_gradients(statistics_of(objective.loss), objective, accumulation)
        return jax.jit(lambda b: run(trained, b, (), FIRST, {})[:2])

    run = make(1)
    grads, metrics = run(b)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    close(make(4)(padded(b)), (grads, metrics))
    # Negative control: a mean of the means of micro-batches is another gradient.
    parts = [run({k: x[i::4] for k, x in b.items()})[0] for i in range(4)]
    with pytest.raises(AssertionError):
        close(jax.tree.map(lambda *g: sum(g) / 4, *parts), grads, 1e-2)


@pytest.mark.parametrize("name", tiny.mostly_slow(["dice", "tversky"], ("dice",)))
def test_a_mean_of_ratios_is_another_gradient(name):
    """Negative control: the ratio of each micro-batch alone would show."""
    loss, b = LOSSES[name](**METHODS[name]), batch()
    run = compute(loss, names=(), z_loss=0.0)
    parts = [run({k: x[i::4] for k, x in b.items()})[0] for i in range(4)]
    with pytest.raises(AssertionError):
        close(jax.tree.map(lambda *g: sum(g) / 4, *parts), run(b)[0], 1e-2)


def test_keys_are_of_seed_step_row_and_position():
    keys = jax.random.key_data(token_keys(3, FIRST, (4, 6)))
    assert len(np.unique(keys.reshape(24, -1), axis=0)) == 24
    np.testing.assert_array_equal(jax.random.key_data(token_keys(3, FIRST, (2, 3))), keys[:2, :3])
    for other in (token_keys(4, FIRST, (4, 6)), token_keys(3, FIRST + 1, (4, 6))):
        assert (jax.random.key_data(other) != keys).any(-1).all()


def build(loss, devices=1, **overrides):
    config = tiny.config(
        objective__loss=loss, data__sequence_length=16, model__layers=1, **overrides
    )
    return experiment.build(config, tiny.VOCAB, jax.devices()[:devices])


def steps(run, batches):
    """The states and metrics of the jitted step, on the mesh of `run`."""
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.init)(jax.random.key(0))
        step = jax.jit(
            make_train_step(run.model, run.optimizer, run.schedule, run.objective, run.config)
        )
        states, metrics = [jax.device_get(state)], []
        for b in batches:
            state, values = step(state, put_batch(run.mesh, b))
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(values))
    return states, metrics


TEMPNET = {
    "objective__tempnet__width": 5,
    "objective__tempnet__rho": 1.0,
    "objective__tempnet__learning_rate": 1e-3,
    "train__ema_decay": 0.5,
}


@pytest.mark.slow
def test_a_network_of_the_loss_is_trained_at_its_own_rate_and_drops_the_same_everywhere():
    batches = [tiny.batch(rows=8, seed=i) for i in range(2)]
    states, metrics = steps(build("tempnet", mesh__data=1, **TEMPNET), batches)
    other_states, other = steps(
        build("tempnet", 4, mesh__data=2, mesh__sequence=2, train__accumulation=2, **TEMPNET),
        batches,
    )
    close(other, metrics, 1e-3)
    close(other_states[1].trained.loss, states[1].trained.loss, 1e-3)
    before, after = (s.trained.loss["second"] for s in states[:2])
    # Adam's first step: the schedule begins at half of the peak.
    np.testing.assert_allclose(np.abs(after - before).max(), 5e-4, rtol=1e-2)
    assert jax.tree.structure(states[0].ema) == jax.tree.structure(states[0].trained)


def test_a_batch_without_weight_changes_nothing():
    b = tiny.batch(rows=8)
    empty = {**b, "weights": jnp.zeros_like(b["weights"])}
    run = build("dice", mesh__data=1)
    (before, after), (metrics,) = steps(run, [empty])
    jax.tree.map(np.testing.assert_array_equal, before.trained, after.trained)
    assert metrics["skipped_steps"] == 1
    assert np.isfinite(metrics["loss"])


class Letters:
    """A tokenizer of one token a character."""

    end_of_text = beginning_of_text = 0

    def encode(self, text):
        return [ord(c) % tiny.VOCAB for c in text], None

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)


@pytest.mark.slow
def test_a_harmonic_head_is_evaluated_and_sampled_by_its_distances():
    run = build("harmonic", mesh__data=1, objective__harmonic__exponent=30.0)
    params, b = tiny.params(run.model), tiny.batch(length=16)
    # Columns of uneven length: the largest product is not the smallest distance.
    params["head"]["kernel"] *= jnp.linspace(0.1, 4.0, tiny.VOCAB)
    trained = Trained(params)
    hidden = tiny.hidden(run.model, trained.params, b)
    distance = jnp.sum((hidden[:, :, None] - run.model.head(trained.params).T) ** 2, -1) / 32
    log_p = jax.nn.log_softmax(-30 * jnp.log(distance + 1e-4))
    nll = -jnp.take_along_axis(log_p, b["targets"][..., None], -1)[..., 0]
    sums = run.eval_step()(trained, b)
    np.testing.assert_allclose(sums["nll"], jnp.sum(b["weights"] * nll), rtol=1e-5)
    other = jax.jit(make_eval_step(run.model, 16))(trained, b)
    assert abs(other["nll"] - sums["nll"]) > 0.01 * sums["nll"]

    prompt = jnp.asarray([[0, 5, 6, 7]])
    positions = jnp.arange(4)[None]
    inputs = Tokens(prompt, positions, jnp.ones_like(prompt))
    hidden = run.model.apply(trained.params, inputs).hidden[0, -1]
    centres = run.model.head(trained.params).T
    nearest = int(jnp.argmin(jnp.sum((hidden - centres) ** 2, -1)))
    assert nearest != int(jnp.argmax(centres @ hidden)), "the test cannot tell the heads apart"
    prompt = "".join(chr(tiny.VOCAB * 2 + i) for i in (5, 6, 7))
    sampler = sampling.Sampler(run.model, Letters(), loss=run.objective.loss, temperature=0)
    text = sampler(trained, prompt, 0, 1).removeprefix(prompt)
    assert text == ("" if nearest == 0 else Letters().decode([nearest]))


@pytest.mark.slow
def test_a_student_with_one_block_is_its_teacher_and_with_more_is_not():
    model, b = tiny.model(layers=1), tiny.batch()
    trained = Trained(tiny.params(model))
    teacher = ReferenceModel(make_forward(model), None, 0.0, trained)
    for length, equal in ((16, True), (3, False)):
        loss = LOSSES["block_distillation"](block_length=length)
        objective = weighted(loss)
        compute = make_gradients(make_training_statistics(model, 16, objective), objective, 2)
        grads, metrics, _ = jax.jit(
            lambda t, b, compute=compute: compute(t, b, (), FIRST, {"teacher": teacher})
        )(trained, b)
        assert (metrics["loss"] < 1e-6) == equal
        size = max(np.abs(g).max() for g in jax.tree.leaves(grads))
        assert (size < 1e-5) == equal


@pytest.mark.slow
def test_a_run_distils_its_own_average():
    batches = [tiny.batch(rows=8, seed=i) for i in range(2)]
    run = build(
        "block_distillation",
        mesh__data=1,
        objective__block_distillation__block_length=3,
        objective__references__teacher="ema",
        train__ema_decay=0.5,
    )
    assert run.references() == ("teacher",)
    states, metrics = steps(run, batches)
    assert metrics[0]["loss"] > 0.001
    assert metrics[0]["nll"] > 1
    assert metrics[0]["teacher_divergence"] > 0.001
    assert 0 < metrics[0]["teacher_agreement"] < 1
    assert metrics[-1]["skipped_steps"] == 0
    # Of the same parameters: the student's blocks are what it is evaluated with.
    trained = states[0].trained
    cut, whole = (
        jax.jit(make_eval_step(run.model, 16, None, loss))(trained, batches[0])["nll"]
        for loss in (run.objective.loss, Loss())
    )
    assert abs(cut - whole) > 1e-3 * whole


def test_the_config_has_every_hyper_parameter_with_its_default():
    sections = base.get_config().objective
    assert set(METHODS) == set(LOSSES)
    for name, factory in LOSSES.items():
        parameters = inspect.signature(factory).parameters
        defaults = {key: p.default for key, p in parameters.items()}
        section = sections[name].to_dict() if defaults else {}
        assert section == defaults
        assert all(type(section[key]) is type(default) for key, default in defaults.items())


BAD = {
    "name": ({"objective__loss": "tempnt"}, "did you mean 'tempnet'"),
    "number": (
        {"objective__loss": "tempnet", "objective__tempnet__dropout": 1.0},
        "objective.tempnet.dropout=1.0 must be below 1",
    ),
    "softcap": (
        {"objective__loss": "harmonic", "model__logit_softcap": 5.0},
        "objective.loss='harmonic' has no logits that model.logit_softcap=5.0 could bound",
    ),
    "sign": (
        {
            "objective__loss": "dice",
            "objective__weighting": "wga",
            "objective__normalisation": "all",
        },
        "objective.weighting='wga' has negative weights",
    ),
    "teacher": ({"objective__loss": "block_distillation"}, "needs objective.references.teacher"),
    "stored teacher": (
        {"objective__loss": "top_k_distillation"},
        "'top_k_distillation' needs objective.references.teacher_top_k; valid: a folder of launch",
    ),
    "model for a store": (
        {"objective__loss": "uld", "objective__references__teacher_sorted": "ema"},
        "teacher_sorted='ema' is not possible; valid: a folder of launch.score",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_loss_is_refused_before_anything_runs(case):
    keys, message = BAD[case]
    with pytest.raises(InputError, match=message):
        experiment.build(tiny.config(**keys), tiny.VOCAB, jax.devices()[:1])
