"""Weightings in the training step: the whole batch decides, however it is split."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings

from configs import base
from lm.errors import InputError
from lm.parallel.mesh import make_mesh
from lm.training import experiment, make_objective
from lm.training.gradients import make_gradients
from lm.training.step import make_train_step
from objectives.weighted import weighted
from objectives.weighting import WEIGHTINGS, normalise
from objectives.weighting.base import Weighting

FIRST = jnp.zeros((), jnp.int32)


def compute(weighting: Weighting, accumulation=1, statistics=weightings.bigram_statistics):
    """A jitted batch -> (gradients, metrics, state of the weighting)."""
    objective = weighted(weighting=weighting, z_loss=0.1)
    gradients = make_gradients(lambda *of: (statistics(*of), {}), objective, accumulation)

    def run(b):
        return gradients(weightings.bigram(), b, weightings.state(weighting), FIRST)

    return jax.jit(run)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.nanmax(np.abs(y)) + 1e-9
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)


def padded(b, rows=4, columns=3):
    """More rows and columns of weight 0, with NaN in everything that is a float."""

    def pad(name, x):
        widths = [(0, rows), (0, columns)][: x.ndim]
        fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) and name != "weights" else 0
        return jnp.pad(x, widths, constant_values=-5 if name == "sample_ids" else fill)

    return {name: pad(name, x) for name, x in b.items()}


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(weightings.METHODS, ("glow",)),
)
def test_the_order_the_split_and_the_scale_of_the_batch_change_nothing(name):
    """Gradients, metrics and state; the batch statistics of a method are those of all of it."""
    weighting = weightings.make(name)
    b = weightings.batch() | {"poison": jnp.zeros((8, 12))}
    run = compute(weighting)
    grads, metrics, state = run(b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))

    order = np.random.default_rng(1).permutation(8)
    close(run({k: x[order] for k, x in b.items()}), (grads, metrics, state))

    scaled_grads, scaled, _ = run({**b, "weights": 7 * b["weights"]})
    close(scaled_grads, grads)
    close(scaled, {**metrics, "weight_sum": 7 * metrics["weight_sum"]})

    close(compute(weighting, accumulation=4)(padded(b)), (grads, metrics, state))

    mesh = make_mesh({"data": 4, "fsdp": 1, "tensor": 1, "sequence": 2})
    rows = jax.NamedSharding(mesh, jax.P("data"))
    cells = jax.NamedSharding(mesh, jax.P("data", "sequence"))
    spread = {k: jax.device_put(x, cells if x.ndim == 2 else rows) for k, x in b.items()}
    with jax.set_mesh(mesh):
        close(run(spread), (grads, metrics, state))


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(["rho1", "dynamic", "uskd", "q_tuning"], ("rho1",))
)
def test_statistics_of_micro_batches_are_another_gradient(name):
    """Negative control: with weights settled in each micro-batch, accumulation would show."""
    weighting, b = weightings.make(name), weightings.batch()
    run = compute(weighting)
    parts = [run({k: x[i::4] for k, x in b.items()}) for i in range(4)]
    total = sum(metrics["weight_sum"] for _, metrics, _ in parts)
    sums = jax.tree.map(
        lambda *g: sum(x * p[1]["weight_sum"] for x, p in zip(g, parts, strict=True)) / total,
        *(grads for grads, _, _ in parts),
    )
    with pytest.raises(AssertionError):
        close(sums, run(b)[0], 1e-2)


@pytest.mark.parametrize("by", tiny.mostly_slow(["all", "sequence"], ("sequence",)))
def test_other_normalisations_survive_accumulation(by):
    weighting, b = normalise(weightings.make("dft"), by), weightings.batch()
    expected = compute(weighting)(b)
    close(compute(weighting, accumulation=4)(b), expected)
    with pytest.raises(AssertionError):
        close(expected[0], compute(weightings.make("dft"))(b)[0], 1e-2)


def test_one_micro_batch_has_one_forward_pass():
    calls = []

    def counted(params, batch):
        calls.append(batch)
        return weightings.bigram_statistics(params, batch)

    compute(weightings.make("dynamic"), statistics=counted)(weightings.batch())
    assert len(calls) == 1


def test_a_nan_reference_is_a_nan_loss_and_metrics_are_there():
    weighting, b = weightings.make("rho1"), weightings.batch()
    run = compute(weighting)
    _, metrics, _ = run(b)
    targets = int((b["weights"] != 0).sum())
    np.testing.assert_allclose(metrics["kept_share"], -(-targets // 2) / targets, rtol=1e-6)
    assert {"weight_entropy", "effective_sample_size", "weight_sum"} <= set(metrics)
    live = tuple(np.argwhere(b["weights"])[0])
    poisoned = {**b, "reference_nll": b["reference_nll"].at[live].set(jnp.nan)}
    assert np.isnan(run(poisoned)[1]["loss"])


EMA_RHO1 = {
    "objective__weighting": "rho1*dynamic",
    "objective__references__reference_nll": "ema",
    "objective__rho1__keep": 0.5,
    "train__ema_decay": 0.9,
    "model__layers": 1,
}


@pytest.mark.slow
def test_the_moving_average_is_a_reference_however_the_batch_is_split():
    batches = [tiny.batch(rows=8, seed=i) for i in range(3)]
    metrics, state = tiny.steps(batches, mesh__data=1, **EMA_RHO1)
    # At first the average is the model: no token has an excess, and all tie.
    assert metrics[0]["kept_share"] == 1
    assert abs(metrics[2]["kept_share"] - 0.5) < 0.01
    other, other_state = tiny.steps(
        batches, 4, train__accumulation=4, mesh__data=2, mesh__sequence=2, **EMA_RHO1
    )
    close(other, metrics, 1e-3)
    close(other_state.trained, state.trained, 1e-2)


def test_a_skipped_step_keeps_the_table_of_losses():
    options = {"objective__weighting": "glow", "objective__glow__samples": 8}
    config = tiny.config(data__sequence_length=16, mesh__data=1, **options)
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    step = jax.jit(make_train_step(run.model, run.optimizer, run.schedule, run.objective, config))
    b = tiny.batch(rows=8) | {"sample_ids": jnp.arange(8, dtype=jnp.int32)[:, None].repeat(16, 1)}
    first, values = step(jax.jit(run.init)(jax.random.key(0)), b)
    assert np.isfinite(first.objective).all()
    second, values = step(first, {**b, "sample_ids": b["sample_ids"] + 1})
    assert values["skipped_steps"] == 1
    assert np.isnan(values["loss"])
    np.testing.assert_array_equal(second.objective, first.objective)
    jax.tree.map(np.testing.assert_array_equal, second.trained, first.trained)


def test_the_config_has_every_hyper_parameter_with_its_default():
    sections = base.get_config().objective
    assert set(weightings.METHODS) == set(WEIGHTINGS)
    for name, factory in WEIGHTINGS.items():
        parameters = inspect.signature(factory).parameters
        defaults = {key: p.default for key, p in parameters.items()}
        section = sections[name].to_dict() if defaults else {}
        assert section == defaults
        assert all(type(section[key]) is type(default) for key, default in defaults.items())


@pytest.mark.parametrize("names", ["dft*dynamic", "dft, dynamic", "uniform*dft"])
def test_a_config_names_one_or_several(names):
    weighting = make_objective.make_weighting(tiny.config(objective__weighting=names))
    assert weighting.uses_statistics
    # As of a single one: a run goes on with another weighting from the same checkpoint.
    assert weighting.init() == ()


BAD = {
    "name": ({"weighting": "rho"}, "did you mean 'rho1'"),
    "one of several": ({"weighting": "dft*dynamc"}, "did you mean 'dynamic'"),
    "empty": ({"weighting": ""}, "objective.weighting=''"),
    "twice": ({"weighting": "dft*dft"}, "names 'dft' twice"),
    "keep": ({"weighting": "rho1", "rho1__keep": 0.0}, "objective.rho1.keep=0.0 must be above 0"),
    "above 1": ({"weighting": "rho1", "rho1__keep": 1.1}, "objective.rho1.keep=1.1"),
    "reference": (
        {"weighting": "rho1"},
        "objective.weighting='rho1' needs objective.references.reference_nll; valid: 'ema' with "
        "train.ema_decay above 0, 'base' with model.adapter_rank above 0 and train.trainable='', "
        "a work directory, a Hugging Face folder, a .gguf file, a folder of launch.score",
    ),
    "several references": (
        {"weighting": "fait", "references__error_mask": "folder"},
        "'fait' needs objective.references.faulty_log_probability; valid: a folder of launch.score",
    ),
    "average": (
        {"weighting": "rho1", "references__reference_nll": "ema"},
        "objective.references.reference_nll='ema' is not possible; .*train.ema_decay above 0",
    ),
    "stored only": (
        {"weighting": "critical_token", "references__contrast_probability": "ema"},
        "references.contrast_probability='ema' is not possible; valid: a folder of launch.score$",
    ),
    "history": (
        {"weighting": "ss_token", "ss_token__gamma": 0.5},
        "'ss_token' needs objective.references.history_nll; valid: 'ema' with",
    ),
    "table": ({"weighting": "glow"}, "objective.glow.samples=0 must be at least 1"),
    "normalisation": ({"normalisation": "keep"}, "did you mean 'kept'"),
    "sign": ({"weighting": "dft*wga"}, "valid: 'all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_objective_is_refused_before_anything_runs(case):
    keys, message = BAD[case]
    config = tiny.config(**{f"objective__{key}": value for key, value in keys.items()})
    with pytest.raises(InputError, match=message):
        make_objective.make_weighting(config)


def test_the_nll_of_all_targets_is_a_metric_under_every_weighting():
    """Under `ss_token` with another loss, too; the weighted loss is another number."""
    options = {"objective__ss_token__gamma": 0.0, "objective__ss_token__keep": 0.5}
    metrics, _ = tiny.steps(
        [tiny.batch(rows=8) | {"sample_ids": jnp.arange(8)[:, None].repeat(16, 1)}],
        mesh__data=1,
        objective__weighting="ss_token",
        objective__loss="inverted_hinge",
        **options,
    )
    assert abs(metrics[0]["nll"] - metrics[0]["loss"]) > 0.1
