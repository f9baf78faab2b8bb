"""Low-rank adapters, the rule of what is trained, and frozen matrices as codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings
from ml_collections import ConfigDict

from lm.errors import InputError
from lm.model import adapters
from lm.model.packed_matrix import FORMATS, GROUP, PackedMatrix, is_packed, pack, unpack_all
from lm.model.transformer import make_model
from lm.training import experiment
from objectives.losses import LOSSES

RANK = {"model__adapter_rank": 3, "model__adapter_alpha": 6.0}
RATE = {"optimizer__peak_learning_rate": 0.02}


@pytest.fixture(scope="module")
def tuned():
    """(run, first state, state after four steps) with adapters."""
    return steps(**RANK, **RATE)


def steps(count=4, batch=None, devices=1, **overrides):
    config = tiny.config(data__sequence_length=16, **overrides)
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:devices])
    batch = tiny.batch(rows=8) if batch is None else batch
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        first, step = jax.device_get(state), run.train_step()
        for _ in range(count):
            state, _ = step(state, batch)
    return run, first, jax.device_get(state)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def test_fresh_adapters_change_nothing_and_trained_ones_equal_their_dense_product(tuned):
    run, first, last = tuned
    plain = make_model(adapters.merged_config(run.model.config))
    b = tiny.batch(rows=2)
    base = {n: x for n, x in by_path(first.trained.params).items() if "_adapter_" not in n}
    without = jax.tree.unflatten(jax.tree.structure(tiny.params(plain)), list(base.values()))
    np.testing.assert_allclose(
        tiny.hidden(run.model, first.trained.params, b), tiny.hidden(plain, without, b), atol=1e-6
    )
    merged = adapters.merge(run.model.config, last.trained.params)
    found = tiny.hidden(run.model, last.trained.params, b)
    np.testing.assert_allclose(found, tiny.hidden(plain, merged, b), atol=2e-5)
    assert np.abs(found - tiny.hidden(plain, without, b)).max() > 0.01
    # The product by hand.
    mlp = last.trained.params["layers"]["mlp"]
    change = mlp["up_adapter_in"].astype(np.float64) @ mlp["up_adapter_out"] * (6.0 / 3)
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"], mlp["up"] + change, atol=1e-6)


def test_what_is_frozen_is_identical_and_has_no_moments(tuned):
    _, first, last = tuned
    old, new = by_path(first.trained.params), by_path(last.trained.params)
    for path, before in old.items():
        same = np.array_equal(before, new[path])
        assert same != path.endswith(("_adapter_in", "_adapter_out")), path
    moments = [x for x in jax.tree.leaves(last.optimizer) if np.ndim(x)]
    trained = sum(x.size for path, x in new.items() if "_adapter_" in path)
    assert sum(x.size for x in moments) == 2 * trained


def test_the_compiled_step_computes_no_gradient_of_what_is_frozen():
    def flops(**overrides):
        config = tiny.config(data__sequence_length=16, model__mlp_width=256, **overrides)
        run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
        with jax.set_mesh(run.mesh):
            lowered = run.train_step().lower(run.abstract_state(), tiny.batch(rows=8))
            return lowered.compile().cost_analysis()["flops"]

    assert flops(model__adapter_rank=1) < 0.78 * flops()
    assert flops(train__trainable="norm") < 0.75 * flops()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mlp|final_norm", {"layers/mlp/up", "layers/mlp/down", "layers/mlp_norm/scale"}),
        ("x^", None),
    ],
)
def test_a_rule_says_what_is_trained(rule, expected):
    if expected is None:
        with pytest.raises(InputError, match=r"train\.trainable='x\^' fits no parameter"):
            steps(count=0, train__trainable=rule)
        return
    _, first, last = steps(train__trainable=rule, **RATE)
    old, new = by_path(first.trained.params), by_path(last.trained.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == expected | {"final_norm/scale"}


def test_adapters_are_only_where_the_rule_says():
    run, first, _ = steps(count=0, **RANK, model__adapter_matrices="attention/(query|value)")
    names = {path for path in by_path(first.trained.params) if "_adapter_" in path}
    at = "layers/attention"
    assert names == {
        f"{at}/{name}_adapter_{end}" for name in ("query", "value") for end in ("in", "out")
    }
    assert run.model.config.adapter_rank == 3


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_and_is_off_in_evaluation(tuned):
    _, _, plain = tuned
    options = {**RANK, **RATE, "model__adapter_dropout": 0.5}
    (run, first, one), (_, _, two), (_, _, other) = (
        steps(**options, train__seed=seed) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one.trained, two.trained)
    up = "layers/mlp/up_adapter_out"
    changed = [by_path(s.trained.params)[up] for s in (plain, one, other)]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(changed))
    with jax.set_mesh(run.mesh):
        b, evaluate = tiny.batch(rows=8), run.eval_step()
        losses = {float(evaluate(first.trained, b)["nll"]) for _ in range(2)}
    assert len(losses) == 1


# One of each way through a training step: what is trained is decided outside of the methods.
CASES = [
    *("weighting=rho1", "weighting=glow", "weighting=sat_imp", "weighting=ss_token"),
    *("loss=cross_entropy", "loss=dice", "loss=tempnet", "loss=distillation"),
    *("quantizer=paretoq", "quantizer=absmax", "activations=int8", "accumulation=2"),
]


@pytest.mark.parametrize("case", tiny.mostly_slow(CASES, ("weighting=rho1",)))
def test_every_method_trains_adapters_and_leaves_the_base(case):
    key, name = case.split("=")
    overrides = {**RANK, **RATE}
    if key in ("quantizer", "activations"):
        overrides |= {f"quantization__{key}": name, "quantization__fraction": "1"}
        overrides |= {"quantization__bits": 4.0 if key == "quantizer" else 16.0}
    elif key == "accumulation":
        overrides["train__accumulation"] = 2
    else:
        overrides[f"objective__{key}"] = name
    if name == "glow":
        overrides["objective__glow__samples"] = weightings.SAMPLES
    for teacher in LOSSES[name]().teachers if key == "loss" else ():
        overrides |= {f"objective__references__{teacher}": "ema", "train__ema_decay": 0.9}
    if key == "weighting":
        # What is compared with is in the batch, as if it were stored.
        for reference in weightings.make(name).references:
            overrides[f"objective__references__{reference}"] = "stored"
        if name in ("sat_imp", "sim_sat", "sim_imp", "wga"):
            overrides["objective__normalisation"] = "all"
    config = tiny.config(data__sequence_length=16, **overrides)
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    b = weightings.batch(rows=8, length=16)
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.init)(jax.random.key(0))
        first = jax.device_get(state.trained.params)
        quantized = key in ("quantizer", "activations")
        state, metrics = run.train_step(quantized)(state, b)
    assert np.isfinite(metrics["loss"])
    old, new = by_path(first), by_path(jax.device_get(state.trained.params))
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed
    assert all("_adapter_" in path for path in changed)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("inputs", [2 * GROUP, 6])
def test_packed_matrices_round_to_the_nearest_value(kind, inputs):
    w = np.random.default_rng(0).standard_normal((2, inputs, 5)).astype(np.float32)
    packed = pack(jnp.asarray(w), kind)
    groups = max(inputs // GROUP, 1)
    w_GKO = w.reshape(2, groups, -1, 5)
    largest = np.abs(w_GKO).max(2, keepdims=True)
    table = {"int8": np.arange(-127, 128) / 127, "int4": np.arange(-7, 9) / 7}.get(kind)
    table = np.asarray(packed.table)[0] if table is None else table
    distance = np.abs((w_GKO / largest)[..., None] - table)
    expected = (table[distance.argmin(-1)] * largest).reshape(w.shape)
    np.testing.assert_allclose(packed.unpack(), expected, atol=1e-6)
    size = packed.codes.nbytes / w.size
    assert size == (1.0 if kind == "int8" else 0.5)
    assert (table == 0).any()


@pytest.mark.slow
def test_packed_base_takes_the_steps_of_its_own_weights():
    """Training on codes is training on the weights that they stand for."""
    options = {**RANK, **RATE, "model__width": 64}
    _, first, packed = steps(**options, train__frozen="nf4")
    leaves = jax.tree.leaves(first.trained.params, is_leaf=is_packed)
    assert sum(map(is_packed, leaves)) == 6
    run, _, _ = steps(count=0, **options)
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.init)(jax.random.key(0), unpack_all(first.trained.params))
        step = run.train_step()
        for _ in range(4):
            state, _ = step(state, tiny.batch(rows=8))
    for path, leaf in by_path(state.trained.params).items():
        if "_adapter_" in path:
            np.testing.assert_allclose(
                leaf, by_path(packed.trained.params)[path], atol=1e-4, err_msg=path
            )
    same = jax.tree.map(np.array_equal, first.trained.params, packed.trained.params)
    assert all(ok for path, ok in by_path(same).items() if "_adapter_" not in path)


@pytest.mark.slow
def test_packed_base_on_a_mesh_is_sharded_and_takes_the_same_steps():
    options = {**RANK, **RATE, "train__frozen": "int8", "model__width": 64}
    _, _, one = steps(**options)
    run, _, many = steps(**options, devices=4, mesh__fsdp=2, mesh__tensor=2)
    placed = run.abstract_state().trained.params["layers"]["mlp"]["up"]
    assert isinstance(placed, PackedMatrix)
    assert placed.codes.sharding.shard_shape(placed.codes.shape) == (2, 32, 32)
    for path, leaf in by_path(many.trained.params).items():
        if "_adapter_" in path:
            np.testing.assert_allclose(leaf, by_path(one.trained.params)[path], atol=2e-3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model__adapter_rank": -1}, "model.adapter_rank=-1 must be 0"),
        ({"model__adapter_rank": 2, "model__adapter_alpha": 0.0}, "model.adapter_alpha=0.0"),
        ({"model__adapter_rank": 2, "model__adapter_dropout": 1.0}, "model.adapter_dropout=1.0"),
        ({"model__adapter_rank": 2, "model__adapter_matrices": "("}, "no regular expression"),
        ({"model__adapter_rank": 2, "model__adapter_matrices": "zzz"}, "fits no parameter"),
        ({"train__trainable": "["}, "train.trainable='[' is no regular expression"),
        ({"train__frozen": "int3"}, "train.frozen='int3' is not one of: as_is, int8"),
        ({"train__frozen": "nf4", "train__ema_decay": 0.9}, "needs train.ema_decay=0"),
        (
            {
                "train__frozen": "nf4",
                "quantization__bits": 4.0,
                "quantization__fraction": "1",
            },
            "needs quantization.bits=16",
        ),
    ],
    ids=str,
)
def test_bad_keys_are_refused_by_name(overrides, expected):
    config: ConfigDict = tiny.config(**overrides)
    with pytest.raises(InputError) as caught:
        experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    assert expected in str(caught.value)
