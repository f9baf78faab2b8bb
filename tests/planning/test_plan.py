"""What is counted before a run, against closed forms; and the reader of compiled programs."""

import json
import math

import jax
import numpy as np
import pytest
import tiny

from configs.papers import compute_optimal_qat
from lm.compression import packed
from lm.errors import InputError
from lm.planning import ahead, plan
from lm.planning.flops import PEAK_FLOPS
from lm.training import experiment
from objectives.quantization import packed_size

LAYERS, WIDTH, MLP, VOCAB = 3, 64, 256, 512
MATRICES = LAYERS * 12 * WIDTH**2  # four of D x D and two of D x 4 D a layer
NORMS = 2 * LAYERS * WIDTH + WIDTH


def config(**overrides):
    square = {
        "model__layers": LAYERS,
        "model__width": WIDTH,
        "model__heads": 8,
        "model__kv_heads": 8,
        "model__mlp_width": MLP,
    }
    return tiny.config(**(square | {"train__batch_size": 16} | overrides))


def planned(devices=1, vocab_size=VOCAB, **overrides):
    return plan.make_plan(experiment.build(config(**overrides), vocab_size, devices))


def test_parameters_are_12_L_D2_and_2_V_D_and_norms():
    p = planned()
    assert p.parameters.by_group == {
        "embedding": VOCAB * WIDTH,
        "layers": MATRICES + 2 * LAYERS * WIDTH,
        "final_norm": WIDTH,
        "head": VOCAB * WIDTH,
    }
    assert p.parameters.total == MATRICES + 2 * VOCAB * WIDTH + NORMS
    assert planned(model__tied_head=True).parameters.total == p.parameters.total - VOCAB * WIDTH


def test_the_plan_is_of_the_arrays_that_training_makes():
    run = experiment.build(config(), VOCAB, jax.devices()[:1])
    state = jax.jit(run.init)(jax.random.key(0))
    p = plan.make_plan(run)
    assert p.bytes["state"].total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert p.parameters.total == sum(x.size for x in jax.tree.leaves(state.trained))


def test_adamw_holds_three_times_the_parameters_and_counters():
    p = planned()
    assert p.bytes["parameters"].total == 4 * p.parameters.total
    counters = p.bytes["state"].total - 3 * p.bytes["parameters"].total
    assert 0 < counters < 100
    # Counters only are missing from the parts.
    assert set(p.bytes) == {"parameters", "optimizer", "state"}


def test_other_states():
    parameters = planned().bytes["parameters"].total
    lion = planned(optimizer__name="lion").bytes["state"].total
    assert 0 < lion - 2 * parameters < 100
    averaged = planned(train__ema_decay=0.9)
    assert averaged.bytes["ema"].total == parameters
    assert 0 < averaged.bytes["state"].total - 4 * parameters < 100
    half = planned(model__param_dtype="bfloat16")
    assert half.bytes["parameters"].total == parameters / 2


@pytest.mark.parametrize(
    ("fsdp", "tensor"), tiny.rows_mostly_slow([(1, 1), (4, 1), (1, 8), (4, 2)], (3,))
)
def test_a_device_holds_its_share_of_every_matrix(fsdp, tensor):
    mesh = {"mesh__data": 1, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    p = planned(fsdp * tensor, **mesh)
    whole = planned()
    matrices = 4 * (p.parameters.total - NORMS)
    assert p.bytes["parameters"].total == whole.bytes["parameters"].total
    assert p.bytes["parameters"].per_device == matrices / (fsdp * tensor) + 4 * NORMS
    assert p.mesh == {"data": 1, "fsdp": fsdp, "tensor": tensor, "sequence": 1}


def test_data_parallelism_shards_nothing():
    p = planned(8)
    assert p.bytes["state"].per_device == p.bytes["state"].total
    assert p.unsharded_parameters == p.parameters.total
    assert planned(1).unsharded == ()


def test_an_axis_that_does_not_divide_is_named_as_unsharded():
    mesh = {"mesh__data": 1, "mesh__tensor": 4}
    p = planned(4, vocab_size=VOCAB + 1, **mesh, mesh__unsharded_tolerance=0.5)
    assert [leaf.name for leaf in p.unsharded[:2]] == ["embedding/table", "head/kernel"]
    assert p.unsharded[0].shape == (VOCAB + 1, WIDTH)
    assert p.unsharded[0].bytes == 4 * (VOCAB + 1) * WIDTH
    assert p.unsharded[0].why == "vocab is not divisible by mesh.tensor=4"
    assert p.unsharded[2].why == "no axis of it is to be divided"
    assert p.unsharded_parameters == 2 * (VOCAB + 1) * WIDTH + NORMS

    share = p.unsharded_parameters / p.parameters.total
    planned(4, vocab_size=VOCAB + 1, **mesh, mesh__unsharded_tolerance=share + 1e-6)
    with pytest.raises(InputError) as refused:
        planned(4, vocab_size=VOCAB + 1, **mesh, mesh__unsharded_tolerance=share - 1e-6)
    message = str(refused.value)
    assert message.startswith("mesh.unsharded_tolerance=")
    assert f"{share:.1%}" in message
    assert "embedding/table [513, 64], vocab is not divisible by mesh.tensor=4" in message


def test_what_fsdp_alone_leaves_whole_is_little_and_data_parallelism_is_no_concern():
    strict = {"mesh__unsharded_tolerance": 0.005}
    planned(4, vocab_size=VOCAB + 1, mesh__data=1, mesh__fsdp=4, **strict)
    planned(4, vocab_size=VOCAB + 1, mesh__data=4, **strict)


def test_a_number_of_devices_plans_like_the_devices():
    sizes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    assert len(jax.devices()) == 8
    there = plan.make_plan(experiment.build(config(**sizes), VOCAB))
    assert planned(8, **sizes) == there
    pod = planned(4096, mesh__data=-1, mesh__fsdp=64, mesh__tensor=8, train__batch_size=512)
    assert pod.mesh["data"] == 8
    assert pod.bytes["parameters"].per_device < there.bytes["parameters"].per_device


def test_flops_and_tokens():
    p = planned(train__steps=7)
    length = config().data.sequence_length
    formula = 6 * (MATRICES + VOCAB * WIDTH) + 12 * LAYERS * length * WIDTH
    assert p.flops_per_token == formula
    assert p.tokens_per_step == 16 * length
    assert p.tokens == 7 * p.tokens_per_step
    assert p.flops == formula * p.tokens
    assert p.flops_per_step * 7 == p.flops


def test_interfaces_side_by_side():
    learned, unknown = plan.compare_interfaces(config(), VOCAB, 1, ("learned", "lerned"))
    assert learned.bytes == planned().bytes
    assert learned.parameters == planned().parameters
    assert unknown.parameters is None
    assert "did you mean 'learned'" in unknown.refused
    every = plan.compare_interfaces(config(), VOCAB, 1)
    assert "learned" in [row.embedding for row in every]


def test_vocabulary_without_a_corpus(tmp_path):
    c = config().data
    c.corpus = "/nowhere"
    assert plan.vocabulary(c) == 257
    c.vocab_size = 1000
    assert plan.vocabulary(c) == 1000
    c.tokenizer = "bpe"
    assert plan.vocabulary(c) == 1000
    c.vocab_size = 256
    with pytest.raises(InputError, match="at least 257"):
        plan.vocabulary(c)
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    c.tokenizer, c.vocab_size = str(path), 0
    assert plan.vocabulary(c) == 3
    c.tokenizer, c.vocab_size = "byts", 1000
    with pytest.raises(InputError, match="did you mean 'bytes'"):
        plan.vocabulary(c)


def test_as_dict_survives_json():
    p = planned(4, mesh__fsdp=4, mesh__data=1)
    record = json.loads(json.dumps(plan.as_dict(p)))
    assert record["parameters"]["total"] == p.parameters.total
    assert record["bytes"]["state"] == p.bytes["state"]._asdict()
    assert record["unsharded"][0]["shape"] == list(p.unsharded[0].shape)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e", "KIND:AxB"),
        ("v7:2x2", "v5e, v5p, v6e"),
        ("v5e:0x2", "at least 1"),
        ("v5e:2x2x2", "2 dimensions"),
        ("v5e:64x64", "at most 256 chips"),
        ("v5p:-1x2x2", "KIND:AxB"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, expected):
    with pytest.raises(InputError, match=expected):
        ahead.load_topology(name)


def test_a_topology_without_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="extra tpu"):
        ahead.load_topology("v5e:2x2")


def test_the_batch_of_a_plan_is_that_of_the_data(tmp_path):
    c = config(data__corpus=tiny.write_corpus(tmp_path))
    run = experiment.build(c, 257, jax.devices()[:1])
    real = next(iter(experiment.train_batches(c, experiment.load_data(c.data))))
    shapes = {name: (x.shape, x.dtype) for name, x in ahead.abstract_batch(run).items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in real.items()}


def test_every_chip_has_a_peak():
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert kinds.keys() == ahead.CHIPS.keys()
    assert all(kind in PEAK_FLOPS for kind in kinds.values())


def test_widths_are_planned_with_bytes_and_the_optimal_split():
    config = tiny.config(
        model__width=64,
        train__steps=4000,
        optimizer__schedule="wsd",
        optimizer__decay_fraction=0.1,
        quantization__bits=4.0,
        quantization__fraction="optimal",
    )
    run = experiment.build(config, tiny.VOCAB, 1)
    widths = {w.bits: w for w in plan.compare_widths(run)}
    assert set(widths) == set(plan.WIDTHS)
    assert widths[7.0].refused == ""
    count = sum(x.size for x in jax.tree.leaves(run.abstract_state().trained.params))
    four, full = widths[4.0], widths[16.0]
    assert full.bytes == 4 * count
    tokens = 4000 * 8 * 32
    np.testing.assert_allclose(four.tokens_per_byte, tokens / (count / 2))
    expected = np.exp(-6.7297 / np.log(four.tokens_per_byte))
    np.testing.assert_allclose(four.optimal_fraction, expected)
    assert four.switch == round((1 - expected) * 4000)
    assert widths[2.0].switch is None

    # What is counted is what is written, tensor by tensor.
    trained = jax.jit(run.init)(jax.random.key(0)).trained
    leaves = packed.code_leaves(trained.params, trained.scales, run.quantized.rules)
    written = 0
    for _, leaf in leaves:
        if isinstance(leaf, packed.Coded):
            written += packed_size(leaf.codes.size, leaf.quantizer.bits) + leaf.grid.scale.nbytes
        else:
            written += leaf.nbytes
    assert four.bytes == written
    assert four.bytes < widths[5.0].bytes < full.bytes / 4


def test_a_width_that_the_quantizer_lacks_says_so():
    config = tiny.config(quantization__quantizer="mxfp4", quantization__granularity="group")
    widths = {w.bits: w for w in plan.compare_widths(experiment.build(config, tiny.VOCAB, 1))}
    assert "4 bits" in widths[3.0].refused


@pytest.mark.parametrize(
    ("size", "count"),
    tiny.rows_mostly_slow([("86m", 86e6), ("396m", 396e6), ("759m", 759e6)], (0,)),
)
def test_the_sizes_of_the_paper_on_quantization(size, count):
    config = compute_optimal_qat.get_config(size)
    run = experiment.build(config, config.data.vocab_size, 8)
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(run.abstract_state().trained.params))
    assert abs(found / count - 1) < 0.01
    assert config.train.steps * 512 * 1024 == pytest.approx(20 * found, rel=0.01)
    assert 0 < run.phases.fraction < 0.2  # 0.161 by the sheet, at 20 tokens a parameter and 4 bits
    np.testing.assert_allclose(run.phases.fraction, 0.1613, atol=2e-3)
