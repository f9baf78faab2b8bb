"""Quantization-aware training: the forward pass, the phases and their arithmetic, costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm.compression.phases import Phases, make_quantized, plan_phases
from lm.errors import InputError
from lm.model.interface import LayerProducts
from lm.model.trained import Trained
from lm.parallel.mesh import put_batch
from lm.training import experiment
from lm.training.forward import make_forward
from lm.training.schedules import make_phase_schedule
from objectives.quantization import activation_quantizer, quantize_tree

# A stable phase from step 2 to 6, quantized from step 4 of 8.
FUSED = {
    "train__steps": 8,
    "optimizer__schedule": "wsd",
    "optimizer__decay_fraction": 0.25,
    "quantization__bits": 2.0,
    "quantization__fraction": "0.5",
}


def build(count=1, **overrides):
    config = tiny.config(data__sequence_length=16, **overrides)
    return experiment.build(config, tiny.VOCAB, jax.devices()[:count])


def trained_model(bits, tied=False, **overrides):
    model = tiny.model(tied_head=tied)
    params = tiny.params(model)
    section = tiny.config(quantization__bits=bits, **overrides).quantization
    quantized = make_quantized(section, params)
    return model, quantized, Trained(params, quantized.first_scales(params))


@pytest.mark.parametrize(
    ("bits", "tied"),
    tiny.rows_mostly_slow([(4.0, False), (1.0, False), (1.58, False), (2.0, True)], quick=(0,)),
)
def test_the_quantized_pass_is_the_plain_pass_of_quantized_weights(bits, tied):
    """Outputs, and gradients in weights and scales, against quantizing the whole tree first."""
    model, quantized, trained = trained_model(bits, tied)
    b = tiny.batch()

    def loss(outputs, head):
        hidden = outputs.hidden
        logits = hidden @ head
        return optax.softmax_cross_entropy_with_integer_labels(logits, b["targets"]).mean()

    def ours(trained):
        return loss(*make_forward(model, quantized)(trained, b))

    def definition(trained):
        params = quantize_tree(trained.params, trained.scales, quantized.rules)
        return loss(*make_forward(model)(Trained(params), b))

    value, grads = jax.jit(jax.value_and_grad(ours))(trained)
    expected, expected_grads = jax.jit(jax.value_and_grad(definition))(trained)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    leaves = jax.tree.leaves(grads.scales)
    assert len(leaves) == 6 + (1 if tied else 2)
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-6 * np.abs(e).max() + 1e-12)
    assert all(np.abs(x).max() > 0 for x in leaves)
    # Negative control: full precision is another loss.
    plain = loss(*make_forward(model)(trained, b))
    assert abs(plain - expected) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["absmax", "minmax", "mxfp4", "fp8_e4m3"])
def test_quantizers_without_learned_scales_train_too(quantizer):
    extra = {"quantization__quantizer": quantizer}
    model, quantized, trained = trained_model(8.0 if "fp8" in quantizer else 4.0, **extra)
    assert not jax.tree.leaves(trained.scales)
    outputs, head = jax.jit(make_forward(model, quantized))(trained, tiny.batch())
    on_grid = quantized.on_grid(trained)
    expected, expected_head = make_forward(model)(Trained(on_grid), tiny.batch())
    np.testing.assert_allclose(outputs.hidden, expected.hidden, atol=1e-5)
    np.testing.assert_array_equal(head, expected_head)


def steps_of(run, batches, quantized):
    metrics = []
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        if quantized:
            state = run.begin_quantized()(state)
        step = run.train_step(quantized)
        for b in batches:
            state, values = step(state, put_batch(run.mesh, b))
            metrics.append(jax.device_get(values))
        assert step._cache_size() <= 1  # 0: put out of a full cache of the whole process
    return state, metrics


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing():
    batches = [tiny.batch(rows=8, seed=i) for i in range(3)]
    one = build(quantization__bits=2.0, quantization__fraction="1", mesh__data=1)
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2, "train__accumulation": 2}
    many = build(8, quantization__bits=2.0, quantization__fraction="1", **mesh)
    (state, metrics), (other, other_metrics) = (steps_of(r, batches, True) for r in (one, many))
    np.testing.assert_allclose(
        [m["loss"] for m in other_metrics], [m["loss"] for m in metrics], rtol=1e-5
    )
    # A weight at the edge of two codes may round to either; few do.
    for a, b in zip(*(jax.tree.leaves(s.trained.scales) for s in (other, state)), strict=True):
        assert np.mean(~np.isclose(a, b, rtol=1e-3)) < 0.02
    up, scale = (other.trained[i]["layers"]["mlp"]["up"].sharding.spec for i in (0, 1))
    assert tuple(up) == (None, "fsdp", "tensor")
    assert tuple(scale) == (None, None, "tensor")
    # Negative control: the same steps in full precision have other losses.
    _, plain = steps_of(one, batches, False)
    assert abs(plain[0]["loss"] - metrics[0]["loss"]) > 1e-3


@pytest.mark.slow
def test_another_loss_and_a_weighting_are_of_the_quantized_model():
    """The quantized step against the plain step of a model that is on its grids already."""
    options = {
        "objective__loss": "inverted_hinge",
        "objective__weighting": "dft*uskd",
        "optimizer__clip_norm": 0.0,
        "mesh__data": 1,
    }
    quantized = {"quantization__bits": 2.0, "quantization__fraction": "1"}
    run, plain = build(**options, **quantized), build(**options)
    b = [tiny.batch(rows=8)]
    state, (metrics,) = steps_of(run, b, True)
    with jax.set_mesh(run.mesh):
        first = run.begin_quantized()(jax.jit(run.init)(jax.random.key(0)))
        on_grid = Trained(jax.jit(run.quantized.on_grid)(first.trained))
        begun = jax.jit(plain.init)(jax.random.key(0))._replace(trained=on_grid)
        _, expected = plain.train_step()(begun, put_batch(plain.mesh, b[0]))
    for name in ("loss", "nll", "weight_sum", "weight_entropy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trained))
    # Negative controls: without quantization, and with cross-entropy, the numbers are others.
    _, (full,) = steps_of(plain, b, False)
    assert abs(full["weight_sum"] - metrics["weight_sum"]) > 1e-4 * metrics["weight_sum"]
    _, (other,) = steps_of(
        build(**options | {"objective__loss": "cross_entropy"}, **quantized), b, True
    )
    assert abs(other["loss"] - metrics["loss"]) > 0.1
    np.testing.assert_allclose(other["weight_sum"], metrics["weight_sum"], rtol=1e-5)


@pytest.mark.slow
def test_scales_are_trained_and_do_not_decay():
    run = build(quantization__bits=2.0, quantization__fraction="1", mesh__data=1)
    state, _ = steps_of(run, [tiny.batch(rows=8)], True)
    first = run.quantized.first_scales(jax.jit(run.init)(jax.random.key(0)).trained.params)
    moved = [bool(np.any(a != b)) for a, b in _pairs(state.trained.scales, first)]
    assert all(moved)
    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    updates, _ = jax.jit(run.optimizer.update)(zeros, run.optimizer.init(zeros), state.trained)
    assert not any(np.any(x) for x in jax.tree.leaves(updates.scales))
    assert np.any(updates.params["layers"]["mlp"]["up"])  # negative control: weights do


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.slow
def test_the_scan_over_layers_keeps_no_second_copy_of_the_weights():
    """Temporaries of a step grow with depth no faster than those of a full-precision step."""

    def temporaries(layers, quantized):
        run = build(
            model__layers=layers,
            model__width=64,
            model__mlp_width=256,
            train__batch_size=1,
            quantization__bits=4.0,
            quantization__fraction="1",
        )
        b = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in tiny.batch(rows=1).items()}
        with jax.set_mesh(run.mesh):
            lowered = run.train_step(quantized).lower(run.abstract_state(), b)
        layer = sum(x.nbytes for x in jax.tree.leaves(_layer(run)))
        return lowered.compile().memory_analysis().temp_size_in_bytes, layer

    def _layer(run):
        layers = run.abstract_state().trained.params["layers"]
        return jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float32), layers)

    (few, layer), (many, _) = temporaries(2, True), temporaries(10, True)
    plain = temporaries(10, False)[0]
    assert many - few < plain - temporaries(2, False)[0] + 8 * 0.2 * layer
    assert many < 1.15 * plain


def test_the_phase_arithmetic():
    config = tiny.config(train__steps=1000, quantization__bits=4.0, quantization__fraction="0.25")
    assert plan_phases(config, 10).switch == 750
    config.quantization.fraction = "optimal"
    # S = 1000 * 8 * 32 / (64,000 * 4 / 8) = 8: exp(-6.7297 / ln 8)
    np.testing.assert_allclose(plan_phases(config, 64_000).fraction, 0.0393, atol=5e-4)
    config.train.accumulation = 4  # a step is a step, however it is split
    assert plan_phases(config, 64_000).switch == 961
    config.quantization.bits = 16.0
    assert plan_phases(config, 64_000) == Phases(1000, 1000)


def test_schedules_of_two_phases():
    base = {"train__steps": 100, "optimizer__schedule": "wsd", "optimizer__warmup_steps": 10}
    base |= {"optimizer__decay_fraction": 0.2, "optimizer__final_fraction": 0.0}

    def rates(fused, switch=60):
        config = tiny.config(**base, quantization__warmup_steps=5, quantization__peak_factor=0.5)
        schedule = make_phase_schedule(config, Phases(100, switch, fused), 1.0)
        return np.array([float(schedule(i)) for i in range(100)])

    fused, plain, unfused = rates(True), rates(True, switch=100), rates(False)
    np.testing.assert_array_equal(fused, plain)  # the switch does not show
    assert fused[60] == 1
    np.testing.assert_allclose(unfused[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert (unfused[10:48] == 1).all()
    assert unfused[59] < 0.1  # the first phase has decayed
    np.testing.assert_allclose(unfused[60:65], 0.5 * np.arange(1, 6) / 5, rtol=1e-5)
    assert (unfused[65:92] == 0.5).all()
    assert unfused[99] < 0.1


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"quantization__bits": 9.0}, "quantization.bits=9"),
        ({"quantization__quantizer": "seq", "quantization__bits": 4.0}, "seq has 2 bits"),
        ({"quantization__quantizer": "lsg"}, "did you mean 'lsq'"),
        (
            {"quantization__granularity": "group", "quantization__group_size": 7},
            "group_size=7 does not divide",
        ),
        ({"quantization__granularity": "row"}, "granularity"),
        ({"quantization__fraction": "1.5"}, "from 0 to 1 or 'optimal'"),
        ({"quantization__fraction": "half"}, "from 0 to 1 or 'optimal'"),
        ({"quantization__fraction": "optimal", "model__width": 1024}, "more than one token a byte"),
        ({"optimizer__schedule": "cosine"}, "needs a stable phase"),
        ({"quantization__fraction": "0.1"}, "not in the stable phase"),
        ({"quantization__fraction": "0.9"}, "not in the stable phase"),
        (
            {"quantization__fused_cooldown": False, "quantization__warmup_steps": 4},
            "quantization.warmup_steps=4",
        ),
        (
            {
                "quantization__fused_cooldown": False,
                "quantization__warmup_steps": 1,
                "quantization__peak_factor": 0.0,
            },
            "quantization.peak_factor",
        ),
    ],
)
def test_bad_sections_are_refused_with_the_reason(overrides, names):
    with pytest.raises(InputError, match=names):
        build(**(FUSED | overrides))


@pytest.mark.parametrize("reset", tiny.mostly_slow([False, True], (True,)))
def test_moments_go_on_or_begin_anew_at_the_switch(reset):
    run = build(mesh__data=1, **FUSED, quantization__reset_optimizer=reset)
    state, _ = steps_of(run, [tiny.batch(rows=8)], False)
    after = run.begin_quantized()(jax.tree.map(jnp.copy, state))
    size = optax.tree.norm(optax.tree.get(after.optimizer, "mu", filtering=_of_matrices))
    assert (size == 0) == reset
    counts = {int(c) for _, c in optax.tree.get_all_with_path(after.optimizer, "count")}
    assert counts == ({0, 1} if reset else {1})  # that of the schedule goes on


def _of_matrices(path, value):
    return any("matrix" in str(key) for key in path)


@pytest.mark.parametrize("kind", tiny.mostly_slow(["int4", "int8", "fp8_e4m3"], ("int8",)))
def test_activations_are_rounded_token_by_token(kind):
    """The inputs of every product, with weights as they are or on grids; not when off."""
    model = tiny.model()
    params, b = tiny.params(model), tiny.batch()
    section = tiny.config(quantization__activations=kind).quantization
    quantized = make_quantized(section, params)
    trained = Trained(params, quantized.first_scales(params))
    assert not jax.tree.leaves(trained.scales)
    hidden = jax.jit(make_forward(model, quantized))(trained, b)[0].hidden
    rounding = activation_quantizer(int(kind[3:]) if kind.startswith("int") else kind)
    seen = []

    def product(path, x, w, scale):
        seen.append(path)
        return rounding(x) @ w

    layers = LayerProducts(product)
    inputs = tiny.inputs(b)
    expected = jax.jit(lambda p: model.apply(p, inputs, products=layers).hidden)(params)
    np.testing.assert_allclose(hidden, expected, atol=2e-5)
    assert set(seen) == {
        f"layers/{name}"
        for name in ("attention/query", "attention/key", "attention/value", "attention/output")
    } | {"layers/mlp/up", "layers/mlp/down"}
    plain = jax.jit(lambda p: model.apply(p, inputs).hidden)(params)
    assert np.abs(hidden - plain).max() > 1e-3
