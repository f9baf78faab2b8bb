"""Widths that change during training: what a plan is made of, and that a run can be resumed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from short_runs import final_state, lines, train

from lm.compression.adaptation import change_scales, moments
from lm.compression.packed import read_packed
from lm.compression.phases import make_quantized
from lm.compression.plan_widths import plan_widths
from lm.compression.snip import snip
from lm.errors import InputError
from lm.model.trained import Trained
from lm.planning.plan import weight_bytes
from lm.training import experiment
from lm.training.state import parameter_shapes
from objectives.quantization import paretoq

ADAPT = {"quantization__bits": 4.0, "quantization__adapt_every": 2}
SHAPES = parameter_shapes(tiny.model())


def bytes_of(bits):
    return weight_bytes(tiny.config(quantization__bits=bits).quantization, SHAPES)


@functools.cache
def made():
    budget = (bytes_of(2.0) + bytes_of(4.0)) // 2
    section = tiny.config(**ADAPT, quantization__adapt_bytes=budget).quantization
    return make_quantized(section, SHAPES)


def test_layers_change_and_the_others_keep_their_scales():
    params = tiny.params(tiny.model())
    quantized, plan = made(), {"layers/mlp/up": (4, 2), "layers/mlp/down": (8, 4)}
    adaptation = quantized.adaptation
    scales = quantized.first_scales(params)
    assert set(adaptation.widths(scales).values()) == {(4, 4)}
    trained = jax.tree.map(lambda x: x, scales)
    up = trained["layers"]["mlp"]["up"]
    trained["layers"]["mlp"]["up"] = up._replace(scale=1.5 * up.scale)
    change = jax.jit(functools.partial(change_scales, quantized.rules))
    found = change(params, trained, adaptation.indices(plan))
    widths = adaptation.widths(found)
    assert {path: widths[path] for path in plan} == plan
    assert widths["layers/attention/key"] == (4, 4)
    changed, weights = found["layers"]["mlp"]["up"].scale, params["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(changed[0], 1.5 * up.scale[0])
    np.testing.assert_allclose(changed[1], paretoq(2).init(weights[1]), rtol=1e-6)
    # Back again in the same program, of which the widths are data.
    again = change(params, found, adaptation.indices({p: (4, 4) for p in plan}))
    assert change._cache_size() <= 1  # 0: put out of a full cache of the whole process
    np.testing.assert_allclose(again["layers"]["mlp"]["up"].scale[1], up.scale[1], rtol=1e-6)


def test_moments_are_found_in_the_state_of_the_optimizer():
    c = tiny.config(data__sequence_length=16)
    run = experiment.build(c, tiny.VOCAB, jax.devices()[:1])
    state = jax.eval_shape(run.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.optimizer)
    first, second, step = moments(zeros)
    assert first["layers/mlp/up"].shape == second["layers/mlp/up"].shape == (2, 32, 64)
    assert step == 1
    lion = experiment.build(tiny.config(optimizer__name="lion"), tiny.VOCAB, jax.devices()[:1])
    with pytest.raises(InputError, match=r"optimizer\.name=adamw"):
        moments(jax.eval_shape(lion.init, jax.random.key(0)).optimizer)


@pytest.mark.slow
def test_a_plan_is_that_of_the_same_statistics():
    """Of full precision gradients it is `plan_widths`; with other moments it is another."""
    model = tiny.model()
    params, batches, quantized = tiny.params(model), [tiny.batch()], made()
    adaptation = quantized.adaptation
    c = tiny.config(data__sequence_length=16)
    run = experiment.build(c, tiny.VOCAB, jax.devices()[:1])
    state = jax.jit(run.init)(jax.random.key(1))
    optimizer = jax.tree.map(lambda x: x + 3 if x.ndim == 0 else x + 1e-3, state.optimizer)
    trained = Trained(params, quantized.first_scales(params))
    rates = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.98}
    found = adaptation.plan(model, trained, params, batches, optimizer, **rates)
    first, second, step = moments(optimizer)
    same = snip(moments=(first, second), step=step, **rates)
    options = {"rules": quantized.rules, "choices": adaptation.choices}
    assert found == plan_widths(model, params, batches, adaptation.budget, same, **options)
    on_grid = quantized.on_grid(trained)
    assert found != adaptation.plan(model, trained, on_grid, batches, optimizer, **rates) or (
        found != adaptation.plan(model, trained, params, [tiny.batch(seed=3)], optimizer, **rates)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization__adapt_bytes": 100}, r"adapt_bytes=100 is too small .* the least is"),
        ({"quantization__adapt_widths": (2, 9)}, r"adapt_widths=\(2, 9\) must be some of: 1, 1.58"),
        ({"quantization__adapt_widths": ()}, r"adapt_widths=\(\) must be"),
        ({"quantization__bits": 16.0}, "needs widths to begin with"),
        ({"quantization__adapt_every": -1}, "adapt_every=-1 must be at least 0"),
        ({"optimizer__name": "lion"}, "needs the moments of AdamW .* optimizer.name='adamw'"),
        ({"train__trainable": "mlp"}, "train.trainable='', or quantization.adapt_weighting=0"),
        ({"quantization__quantizer": "lsq"}, "lsq has 3, 4, 5, 6, 7, 8 bits; got bits=2"),
    ],
)
def test_what_cannot_adapt_is_said(options, message):
    c = tiny.config(**ADAPT | {"quantization__adapt_bytes": 10**6} | options)
    with pytest.raises(InputError, match=message):
        experiment.build(c, tiny.VOCAB, jax.devices()[:1])


@pytest.mark.slow
def test_a_run_adapts_and_a_resumed_one_is_the_same_to_the_bit(tmp_path):
    """Stopped between plans, and at the step of a plan."""
    options = {
        **ADAPT,
        "data__corpus": tiny.write_corpus(tmp_path / "corpus"),
        "quantization__fraction": "0.75",
        "quantization__fused_cooldown": False,
        "quantization__warmup_steps": 1,
        "optimizer__warmup_steps": 1,
        "quantization__adapt_bytes": 18_500,  # 2 bits take 16,040, 4 bits 19,624
        "quantization__adapt_weighting": 0.0,
        "optimizer__peak_learning_rate": 0.02,
        "train__ema_decay": 0.5,
        "train__steps": 8,
        "checkpoint__every_steps": 0,
    }
    c = tiny.config(**options)
    train(c, tmp_path / "whole")
    for name, stop in (("between", 5), ("at a plan", 4)):
        train(c, tmp_path / name, stop_after=stop)
        train(c, tmp_path / name)
    whole, _ = final_state(c, tmp_path / "whole")
    events = [e for e in lines(tmp_path / "whole", "event") if e["event"] == "widths"]
    assert [event["step"] for event in events] == [2, 4, 6]
    assert events[0]["changed"] > 0
    for name in ("between", "at a plan"):
        parts, _ = final_state(c, tmp_path / name)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [e for e in lines(tmp_path / name, "event") if e["event"] == "widths"] == events
    # The widths of the last plan are those of the state, its average and the packed file.
    last = {path: tuple(bits) for path, bits in events[-1]["widths"].items()}
    data = experiment.load_data(c.data)
    adaptation = experiment.build(c, data.tokenizer.vocab_size).quantized.adaptation
    assert adaptation.widths(whole.trained.scales) == last
    assert adaptation.widths(whole.ema.scales) == last
    found = read_packed(tmp_path / "whole" / "packed.safetensors").quantizers
    for path, bits in last.items():
        q = found[path]
        assert getattr(q, "widths", (q.bits, q.bits)) == bits
    with safe_open(tmp_path / "whole" / "packed.safetensors", "np") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert 0.95 * 18_500 < size <= 18_500
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["config"]["quantization"]["adapt_every"] == 2
