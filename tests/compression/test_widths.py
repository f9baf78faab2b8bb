"""Plans of widths: files, checks, and what a run makes of one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from short_runs import final_state, lines, train
from test_phases import build, steps_of

from lm.compression.packed import read_packed
from lm.compression.phases import make_quantized
from lm.compression.widths import (
    as_json,
    inline,
    of_width,
    read_widths,
    with_widths,
    write_widths,
)
from lm.errors import InputError
from lm.model.trained import Trained
from lm.planning.plan import compare_widths, weight_bytes
from lm.training import experiment
from lm.training.forward import make_forward
from lm.training.state import parameter_shapes
from objectives.quantization import Mixed, absmax, lsq, paretoq

PLAN = {
    "layers/mlp/up": (2, 4),
    "layers/mlp/down": (8, 1.58),
    "layers/attention/key": (3, 3),
    "layers/attention/value": (16, 16),
    "head/kernel": (2,),
}
TEXT = as_json(PLAN)
SHAPES = parameter_shapes(tiny.model(tied_head=False))


def test_a_file_gives_the_plan_back(tmp_path):
    path = str(tmp_path / "plan.json")
    write_widths(path, PLAN)
    assert read_widths(path, SHAPES) == PLAN
    assert read_widths(TEXT, SHAPES) == PLAN
    assert read_widths(inline(path), SHAPES) == PLAN
    assert inline(TEXT) == TEXT
    assert inline("") == ""
    assert json.loads(inline(path)) == json.loads(TEXT)
    with pytest.raises(InputError, match="cannot be written"):
        write_widths(tmp_path / "nowhere" / "plan.json", PLAN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers/mlp/up": [4]}', "must have a list of 2 widths"),
        ('{"layers/mlp/up": 4}', "must have a list of 2 widths"),
        ('{"head/kernel": [4, 4]}', "must have a list of 1 widths"),
        ('{"layers/mlp/up": [4, 9]}', "has the width 9; valid: 1, 1.58, 2"),
        ('{"layers/mlp/up": [4, true]}', "has the width True"),
        ('{"layers/mlp/up": [4, "4"]}', "has the width 4; valid"),
        ('{"layers/mlp/up": [4, NaN]}', "has the width nan"),
        ('{"layers/mlp/up": [4, [4]]}', r"has the width \[4\]"),
        ('{"layers/mlp/sideways": [4, 4]}', "is no parameter that is quantized; valid: "),
        ('{"final_norm/scale": [4]}', "is no parameter that is quantized"),
        ('{"layers/mlp/up": [4, 4], "layers/mlp/up": [2, 2]}', "is there twice"),
        ("{}", "must be an object such as"),
        ("{", "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("nowhere.json", "quantization.widths=nowhere.json: No such file"),
    ],
)
def test_a_bad_plan_is_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        read_widths(text, SHAPES)
    assert str(error.value).startswith("quantization.widths")
    assert "\n" not in str(error.value)


def test_a_list_in_a_file_is_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text("[4]")
    with pytest.raises(InputError, match=r"plan\.json: must be an object"):
        read_widths(str(tmp_path / "plan.json"), SHAPES)


def test_rules_follow_the_plan():
    other = absmax(8)
    rules = with_widths(lambda path: other, PLAN, of_width(paretoq))
    assert rules("layers/mlp/up").widths == (2, 4)
    assert rules("layers/attention/key").name == "lsq"  # one width: a plain quantizer
    assert rules("layers/attention/value") is None
    assert rules("layers/attention/query") is other
    assert rules("head/kernel").bits == 2  # not raised to 4, as `default_quantizers` does
    later = with_widths(lambda path: other, PLAN, of_width(paretoq), choices=(2, 3))
    assert isinstance(later("layers/attention/key"), Mixed)
    assert [q.bits for q in later("layers/attention/key").members] == [2, 3]
    for plan, factory, message in (
        ({"layers/mlp/up": (2, 4)}, lsq, "widths of layers/mlp/up: lsq has 3"),
        ({"layers/mlp/up": (16, 4)}, lsq, "16 bits are for all layers or for none"),
    ):
        with pytest.raises(InputError, match=message):
            with_widths(lambda path: other, plan, of_width(factory))


@pytest.fixture(scope="module")
def quantized():
    """(model, what is quantized, parameters and scales) with the plan over 4 bits."""
    model = tiny.model(tied_head=False)
    section = tiny.config(quantization__bits=4.0, quantization__widths=TEXT).quantization
    made = make_quantized(section, SHAPES)
    params = tiny.params(model)
    return model, made, Trained(params, made.first_scales(params))


@pytest.mark.slow
def test_the_pass_is_that_of_layers_quantized_one_by_one(quantized):
    model, made, trained = quantized
    by_hand = jax.tree.map(lambda x: x, trained.params)
    plan = {path: [4, 4] for path in ("query", "key", "value", "output")}
    plan |= {"key": [3, 3], "value": [16, 16], "up": [2, 4], "down": [8, 1.58]}
    for part in ("attention", "mlp"):
        for name, w in by_hand["layers"][part].items():
            layers = [(paretoq(b), w[i]) for i, b in enumerate(plan[name])]
            layers = [w if q is None else q.quantize(w, q.init(w)) for q, w in layers]
            by_hand["layers"][part][name] = jnp.stack(layers)
    for path, bits, axis in (("embedding/table", 4, -1), ("head/kernel", 2, -2)):
        one, leaf = path.split("/")
        q, w = paretoq(bits, contraction_axis=axis), by_hand[one][leaf]
        by_hand[one][leaf] = q.quantize(w, q.init(w))
    b = tiny.batch()

    def loss(forward):
        def of(trained):
            outputs, head = forward(trained, b)
            return jnp.square(outputs.hidden @ head).mean()

        return jax.jit(jax.value_and_grad(of, allow_int=True))

    value, grads = loss(make_forward(model, made))(trained)
    expected, expected_grads = loss(make_forward(model))(Trained(by_hand))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    up, index = grads.params["layers"]["mlp"]["up"], grads.scales["layers"]["mlp"]["up"].index
    assert not index.any()
    inside = np.abs(up) > 0
    np.testing.assert_allclose(
        up[inside], expected_grads.params["layers"]["mlp"]["up"][inside], rtol=1e-3, atol=1e-6
    )
    # Negative control: 4 bits everywhere is another loss.
    section = tiny.config(quantization__bits=4.0).quantization
    plain = make_quantized(section, SHAPES)
    other, _ = loss(make_forward(model, plain))(
        Trained(trained.params, plain.first_scales(trained.params))
    )
    assert abs(other - value) > 1e-4 * abs(value)


def test_bytes_are_those_of_the_plan():
    section = tiny.config(quantization__bits=4.0).quantization
    before = weight_bytes(section, SHAPES)
    section.widths = json.dumps({"layers/mlp/up": [2, 8], "layers/mlp/down": [1.58, 4]})
    down = 64 * 32
    assert weight_bytes(section, SHAPES) - before == (
        (32 * 64 * (2 + 8 - 4 - 4)) // 8 + -(-down // 5) - down // 2
    )
    options = {"quantization__fraction": "1", "quantization__warmup_steps": 1}
    options |= {"quantization__bits": 4.0, "quantization__fused_cooldown": False}
    c = tiny.config(**options, quantization__widths=TEXT, model__tied_head=False)
    run = experiment.build(c, tiny.VOCAB, jax.devices()[:1])
    rows = compare_widths(run)
    assert rows[-1].bytes == weight_bytes(c.quantization, SHAPES)
    c.quantization.widths = ""
    plain = compare_widths(experiment.build(c, tiny.VOCAB, jax.devices()[:1]))
    assert [row.bytes for row in rows[:-1]] == [row.bytes for row in plain]


def test_a_config_names_what_is_wrong():
    for widths, message in (
        ('{"layers/mlp/up": [1, 4]}', "widths of layers/mlp/up: absmax has 2"),
        ('{"layers/mlp/up": [4]}', "quantization.widths: layers/mlp/up must have"),
    ):
        c = tiny.config(quantization__widths=widths, quantization__quantizer="absmax")
        with pytest.raises(InputError, match=message):
            make_quantized(c.quantization, SHAPES)


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing():
    batches = [tiny.batch(rows=8, seed=i) for i in range(3)]
    options = {"quantization__fraction": "1", "quantization__bits": 4.0}
    options |= {"quantization__widths": '{"layers/mlp/up": [2, 8], "layers/mlp/down": [3, 1.58]}'}
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2, "train__accumulation": 2}
    one, many = build(mesh__data=1, **options), build(8, **mesh, **options)
    (state, metrics), (other, others) = (steps_of(run, batches, True) for run in (one, many))
    np.testing.assert_allclose([m["loss"] for m in others], [m["loss"] for m in metrics], rtol=1e-4)
    scale = other.trained.scales["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(scale.index, state.trained.scales["layers"]["mlp"]["up"].index)
    assert tuple(scale.scale.sharding.spec) == (None, None, "tensor")
    # Negative control: with one width the losses are others.
    plain = build(mesh__data=1, **options | {"quantization__widths": ""})
    assert abs(steps_of(plain, batches, True)[1][0]["loss"] - metrics[0]["loss"]) > 1e-3


@pytest.mark.slow
def test_a_run_trains_resumes_and_packs_its_plan(tmp_path):
    """From a file that is gone afterwards: the record holds the plan."""
    (tmp_path / "plan.json").write_text('{"layers/mlp/up": [2, 4], "layers/mlp/down": [8, 3]}')
    options = {
        "data__corpus": tiny.write_corpus(tmp_path / "corpus"),
        "quantization__bits": 4.0,
        "quantization__fraction": "0.5",
        "quantization__fused_cooldown": False,
        "quantization__warmup_steps": 1,
        "train__ema_decay": 0.5,
        "train__steps": 8,
    }
    c = tiny.config(**options, quantization__widths=str(tmp_path / "plan.json"))
    train(c, tmp_path / "whole")
    train(c, tmp_path / "parts", stop_after=6)
    train(c, tmp_path / "parts")
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    plan = record["config"]["quantization"]["widths"]
    assert json.loads(plan) == {"layers/mlp/up": [2, 4], "layers/mlp/down": [8, 3]}
    (whole, _), (parts, _) = (
        final_state(tiny.config(**options, quantization__widths=plan), tmp_path / name)
        for name in ("whole", "parts")
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    # Neither steps nor averages move the indices.
    for trained in (whole.trained, whole.ema):
        index = trained.scales["layers"]["mlp"]["up"].index
        np.testing.assert_allclose(index.reshape(-1), [0, 1], atol=1e-5)
    found = read_packed(tmp_path / "whole" / "packed.safetensors")
    assert found.quantizers["layers/mlp/up"].widths == (2, 4)
    assert found.quantizers["layers/mlp/down"].widths == (8, 3)
    assert found.quantizers["layers/attention/key"].bits == 4
    assert lines(tmp_path / "whole", "validation")[-1]["quantized_loss"] > 0
