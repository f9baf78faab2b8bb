import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm.model.trained import Trained
from lm.parallel.mesh import batch_sharding, put_batch
from lm.training import experiment
from lm.training.forward import make_training_statistics
from lm.training.gradients import make_gradients
from lm.training.step import make_eval_step, make_train_step
from objectives.weighted import weighted

PLAIN = {"mesh__data": 1}


def build(devices=1, **overrides):
    config = tiny.config(**overrides)
    return experiment.build(config, tiny.VOCAB, jax.devices()[:devices])


def programs(run):
    """The jitted start and step of `run`."""
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        step = make_train_step(run.model, run.optimizer, run.schedule, run.objective, run.config)
    start = jax.jit(run.init, out_shardings=shardings)
    return start, jax.jit(step, out_shardings=(shardings, None))


@functools.cache
def averaged():
    """A run with a moving average and its programs, which two tests share."""
    run = build(**PLAIN, train__ema_decay=0.75)
    return run, programs(run)


def run_steps(run, batches, made=None):
    """States and metrics of the jitted step over `batches`, on the mesh of `run`."""
    start, step = made or programs(run)
    with jax.set_mesh(run.mesh):
        state = start(jax.random.key(0))
        states, metrics = [state], []
        for b in batches:
            state, values = step(state, put_batch(run.mesh, b))
            states.append(state)
            metrics.append(jax.device_get(values))
        assert step._cache_size() <= 1  # 0: put out of a full cache of the whole process
    return states, metrics


@functools.cache
def toy():
    """The model of the tests below and its parameters: made once."""
    model = tiny.model()
    return model, tiny.params(model)


@functools.cache
def compiled(model, accumulation):
    """The gradients of a batch, one program for every shape of it."""
    objective = weighted(z_loss=0.1)
    statistics = make_training_statistics(model, 16, objective)
    return jax.jit(make_gradients(statistics, objective, accumulation))


def gradients(model, b, accumulation):
    compute = compiled(model, accumulation)
    return compute(Trained(toy()[1]), b, (), jnp.zeros((), jnp.int32))


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(y, np.float64)).max() + 1e-9
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)


def dense_loss(model, params, b, z_loss):
    """The definition, with a [B, T, V] array."""
    hidden = tiny.hidden(model, params, b)
    logits = hidden @ model.head(params)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, b["targets"])
    lse = jax.nn.logsumexp(logits, axis=-1)
    w = b["weights"]
    return (w * nll).sum() / w.sum() + z_loss * ((w != 0) * lse**2).sum() / (w != 0).sum()


@pytest.mark.parametrize("accumulation", tiny.mostly_slow([1, 2, 4], (4,)))
def test_gradients_are_those_of_the_definition(accumulation):
    """Uneven float weights and an auxiliary term on, any number of micro-batches."""
    (model, params), b = toy(), tiny.batch(rows=8)
    grads, metrics, _ = gradients(model, b, accumulation)
    definition = jax.value_and_grad(functools.partial(dense_loss, model, b=b, z_loss=0.1))
    expected_loss, expected = jax.jit(definition)(params)
    close(grads.params, expected)
    total = metrics["loss"] + 0.1 * metrics["z_loss"]
    np.testing.assert_allclose(total, expected_loss, rtol=1e-6)


def test_a_mean_of_micro_batch_means_is_another_gradient():
    """Negative control: the common mistake is far outside the tolerance above."""
    (model, _), b = toy(), tiny.batch(rows=8)
    parts = [jax.tree.map(lambda x, i=i: x[i::4], b) for i in range(4)]
    means = [gradients(model, part, 1)[0] for part in parts]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *means)
    with pytest.raises(AssertionError):
        close(mean, gradients(model, b, 1)[0], 1e-2)


def test_scaling_all_weights_changes_no_gradient():
    (model, _), b = toy(), tiny.batch(rows=8)
    scaled = {**b, "weights": b["weights"] * 7.0}
    close(gradients(model, scaled, 1)[0], gradients(model, b, 1)[0])


@pytest.mark.parametrize("accumulation", tiny.mostly_slow([1, 2], (2,)))
def test_a_zero_weight_token_may_be_nan(accumulation):
    """A NaN hidden state at a token of weight 0 changes neither the loss nor any gradient."""
    (model, _), b = toy(), tiny.batch()
    b["weights"] = b["weights"].at[1, 5].set(0.0)

    def run(poison):
        def apply(params, inputs, **options):
            outputs = model.apply(params, inputs, **options)
            # The token is found by its value, so that it is found in a micro-batch, too.
            marked = (inputs.positions == 99)[..., None]
            return outputs._replace(hidden=jnp.where(marked, poison, outputs.hidden))

        marked = {**b, "positions": b["positions"].at[1, 5].set(99)}
        return gradients(model._replace(apply=apply), marked, accumulation)

    grads, metrics, _ = run(jnp.nan)
    expected, expected_metrics, _ = run(0.0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    close(grads, expected, 1e-7)
    assert metrics["loss"] == expected_metrics["loss"]


def test_an_all_zero_batch_changes_nothing_but_the_counters():
    b = tiny.batch(rows=8)
    empty = {**b, "weights": jnp.zeros_like(b["weights"])}
    (before, after), (metrics,) = run_steps(build(**PLAIN), [empty])
    same = before._replace(step=after.step, skipped=after.skipped, skipped_in_a_row=1)
    jax.tree.map(np.testing.assert_array_equal, same, after)
    assert after.step == 1
    assert metrics["skipped_steps"] == 1
    assert metrics["loss"] == 0


def test_a_nan_step_keeps_the_old_state_and_the_run_recovers():
    b = tiny.batch(rows=8)
    poisoned = {**b, "weights": b["weights"].at[0, 0].set(jnp.nan)}
    run, made = averaged()
    states, metrics = run_steps(run, [b, poisoned, poisoned, b], made)
    clean, _ = run_steps(run, [b, b], made)
    keep = {"trained", "optimizer", "ema", "norm_mean"}
    for name in keep:
        jax.tree.map(
            np.testing.assert_array_equal, getattr(states[1], name), getattr(states[3], name)
        )
        jax.tree.map(
            np.testing.assert_array_equal, getattr(clean[2], name), getattr(states[4], name)
        )
    assert [int(m["skipped_steps"]) for m in metrics] == [0, 1, 2, 2]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 0]


@pytest.mark.slow
def test_a_spike_is_skipped_only_where_asked():
    b = tiny.batch(rows=8, uneven=False)
    # Targets that the model has come to think unlikely make the gradient jump.
    calm = {**b, "targets": jnp.zeros_like(b["targets"])}
    spike = {**b, "targets": jnp.full_like(b["targets"], 5)}
    options = {"optimizer__peak_learning_rate": 3e-2, "train__steps": 60} | PLAIN
    skipped = {}
    for factor in (0.0, 3.0):
        run = build(train__spike_factor=factor, **options)
        _, metrics = run_steps(run, [calm] * 30 + [spike])
        assert metrics[-1]["grad_norm"] > 3 * metrics[-2]["grad_norm"]
        skipped[factor] = int(metrics[-1]["skipped_steps"])
    assert skipped == {0.0: 0, 3.0: 1}


def test_the_moving_average_follows_its_formula():
    batches = [tiny.batch(rows=8, seed=i) for i in range(3)]
    run, made = averaged()
    states, _ = run_steps(run, batches, made)
    expected = states[0].trained
    for state in states[1:]:
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, state.trained)
    close(states[-1].ema, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh__data": 8},
        {"mesh__data": 2, "mesh__fsdp": 4},
        {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2},
    ],
    ids=str,
)
def test_eight_devices_take_the_same_steps_as_one(mesh):
    batches = [tiny.batch(rows=8, seed=i) for i in range(3)]
    options = {"objective__z_loss": 0.01, "data__sequence_length": 16}
    states, metrics = run_steps(build(8, **mesh, **options), batches)
    expected, expected_metrics = run_steps(build(1, **PLAIN, **options), batches)
    for a, b in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    if mesh.get("mesh__fsdp", 1) > 1:
        query = states[-1].trained.params["layers"]["attention"]["query"]
        assert query.addressable_shards[0].data.size < query.size
        mirror = jax.tree.leaves(states[-1].optimizer)
        assert any(x.shape == query.shape and x.sharding == query.sharding for x in mirror)
    close(
        jax.device_get(states[1].trained), jax.device_get(expected[1].trained), 1e-3
    )  # Adam's first step is near the sign of the gradient: small ones differ most.


def test_evaluation_sums_are_those_of_the_definition():
    (model, params), b = toy(), tiny.batch()
    sums = jax.jit(make_eval_step(model, 16))(Trained(params), b)
    np.testing.assert_allclose(
        sums["nll"] / sums["weight"], dense_loss(model, params, b, 0.0), rtol=1e-6
    )
    np.testing.assert_allclose(sums["bytes"], b["weights"].sum(), rtol=1e-6)


def test_the_step_donates_its_state_and_warns_of_no_rematerialization(capfd):
    run = build(8, mesh__data=2, mesh__fsdp=4)
    with jax.set_mesh(run.mesh):
        state = run.abstract_state()
        step = jax.jit(
            make_train_step(run.model, run.optimizer, run.schedule, run.objective, run.config),
            donate_argnums=0,
        )
        where = batch_sharding(run.mesh)
        b = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where)
            for k, v in tiny.batch(rows=8).items()
        }
        compiled = step.lower(state, b).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes > 0.9 * analysis.output_size_in_bytes
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
