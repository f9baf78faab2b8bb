"""Keys and values in few bits: their numbers, their gradients, their calibration, their storage.

B rows, N query heads, K key-value heads, T tokens, H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from short_runs import final_state, lines, train

from lm.compression.cache import KEYS, calibrate_cache, make_cache_quantizer
from lm.compression.phases import make_quantized, quantized_while_running
from lm.errors import InputError
from lm.model import decoding
from lm.model.attention import attend
from lm.model.interface import LayerProducts
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import put_batch
from lm.training import experiment
from lm.training.forward import make_forward
from lm.training.step import make_eval_step

# Share of the largest key that the steps of `heads` reach.
_KEPT = 0.7


def heads(seed=0, b=2, n=4, k=2, t=12, h=8):
    """Queries, keys with channels of very different sizes, values, and steps that clip a few."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(b, n, t, h))
    key = rng.normal(size=(b, k, t, h)) * np.exp(rng.normal(size=(k, 1, h)))
    value = rng.normal(size=(b, k, t, h)) * np.exp(rng.normal(size=(b, k, t, 1)))
    largest = _KEPT * np.abs(key).max((0, 2))[:, None]
    return *(np.float32(x) for x in (query, key, value)), np.float32(largest)


def reference(query, key, value, step, bits):
    """Attention to numbers on the two grids, one query after the other, in float64."""
    high = 2 ** (bits - 1) - 1
    query, key, value, step = (np.float64(x) for x in (query, key, value, step))
    key = step * np.clip(np.rint(key / step), -high - 1, high)
    scale = np.abs(value).max(-1, keepdims=True) / high
    value = scale * np.rint(value / scale)
    out = np.zeros(query.shape)
    for b, n, t in np.ndindex(query.shape[:3]):
        k = n // (query.shape[1] // key.shape[1])
        scores = key[b, k, : t + 1] @ query[b, n, t] / np.sqrt(query.shape[-1])
        shares = np.exp(scores - scores.max())
        out[b, n, t] = shares / shares.sum() @ value[b, k, : t + 1]
    return out


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_to_a_quantized_cache_is_that_of_a_loop(bits):
    query, key, value, largest = heads()
    step = largest / np.float32(2 ** (bits - 1) - 1)
    quantizer, ones = make_cache_quantizer(bits, key.shape[-1]), jnp.ones((2, 12), jnp.int32)
    out = attend(query, quantizer.keys(key, step), quantizer.values(value), ones, ones)
    np.testing.assert_allclose(out, reference(query, key, value, step, bits), atol=1e-5)
    # Negative control: floats give something else.
    assert np.abs(out - attend(query, key, value, ones, ones)).max() > 1e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored_is_read_as_what_training_sees(bits, dtype):
    """To the last bit, and in as few bytes as promised."""
    _, key, value, largest = heads(h=64)
    key, value = jnp.asarray(key, dtype), jnp.asarray(value, dtype)
    step, quantizer = largest / (2 ** (bits - 1) - 1), make_cache_quantizer(bits, 64)
    stored = quantizer.store(key, value, step)
    read = quantizer.read(stored, step, key.dtype)
    np.testing.assert_array_equal(read[0], quantizer.keys(key, step))
    np.testing.assert_array_equal(read[1], quantizer.values(value))
    assert np.any(read[0] != key)
    empty = quantizer.empty(key.shape)
    assert [(x.shape, x.dtype) for x in stored] == [(x.shape, x.dtype) for x in empty]
    assert stored[0].dtype == (jnp.int8 if bits == 8 else jnp.uint8)
    assert stored[0].nbytes == key.size * bits // 8
    # A head of 64 channels has 4 bytes of scale for its values.
    whole = 2 * 4 * key.size
    assert sum(x.nbytes for x in stored) / whole == (0.2578125 if bits == 8 else 0.1328125)


@pytest.mark.parametrize("seed", range(4))
def test_eight_bits_are_closer_than_four(seed):
    _, key, value, largest = heads(seed)
    errors = {}
    for bits in (8, 4):
        quantizer = make_cache_quantizer(bits, key.shape[-1])
        step = largest / _KEPT / (2 ** (bits - 1) - 1)
        found = quantizer.keys(key, step), quantizer.values(value)
        errors[bits] = [np.abs(a - e).mean() for a, e in zip(found, (key, value), strict=True)]
        # Nothing is further away than half a step of its own grid.
        assert np.all(np.abs(found[0] - key) <= step / 2 * (1 + 1e-4))
    assert np.all(np.array(errors[8]) < np.array(errors[4]) / 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_surrogate(bits):
    """Rounding residues held fixed: x + s r inside of the range, s times the outermost level else.

    Against central differences in float64, for keys and for their steps, with LSQ's factor.
    """
    _, key, value, largest = heads(3)
    high, quantizer = 2 ** (bits - 1) - 1, make_cache_quantizer(bits, key.shape[-1])
    step, weights = largest / high, np.random.default_rng(1).normal(size=key.shape)
    residue = np.rint(np.float64(key / step)) - np.float64(key / step)

    def surrogate(key, step):
        x, clipped = key / step, np.clip(key0 / step0, -high - 1, high)
        inside = clipped == key0 / step0
        return (weights * np.where(inside, step * (x + residue), step * clipped)).sum()

    key0, step0 = np.float64(key), np.float64(step)
    _, pull = jax.vjp(quantizer.keys, jnp.asarray(key), jnp.asarray(step))
    of_key, of_step = pull(jnp.asarray(weights, jnp.float32))
    factor = 1 / np.sqrt(key.shape[-2] * key.shape[-1] * high)
    for at in np.ndindex(step.shape):
        bump = np.zeros(step.shape)
        bump[at] = 1e-6
        slope = (surrogate(key0, step0 + bump) - surrogate(key0, step0 - bump)) / 2e-6
        np.testing.assert_allclose(of_step[at], factor * slope, rtol=1e-3, atol=1e-5)
    clipped = (key / step > high) | (key / step < -high - 1)
    assert clipped.any()
    np.testing.assert_allclose(of_key, np.where(clipped, 0, weights), rtol=1e-5)
    # Values: straight through.
    _, pull = jax.vjp(quantizer.values, jnp.asarray(value))
    np.testing.assert_allclose(pull(jnp.asarray(weights, jnp.float32))[0], weights, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def params(model):
    return tiny.params(model)


def gradients(model, params):
    """Loss and gradients of a model with a cache of 4 bits, its weights in full precision."""
    section, b = tiny.config(quantization__cache="int4").quantization, tiny.batch()
    quantized = make_quantized(section, params, model)
    trained = Trained(params, quantized.first_scales(params))
    forward = make_forward(model, quantized)

    def loss(trained):
        outputs, head = forward(trained, b)
        log_p = jax.nn.log_softmax(outputs.hidden @ head)
        return -jnp.take_along_axis(log_p, b["targets"][..., None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(trained)


def test_training_reaches_the_steps_of_every_layer(model, params):
    _, grads = gradients(model, params)
    step = grads.scales[KEYS]
    assert step.shape == (2, 2, 1, 8)
    assert np.isfinite(step).all()
    assert np.all(np.abs(step).max((1, 2, 3)) > 0)
    assert not jax.tree.leaves({**grads.scales, KEYS: ()})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads.params))


@pytest.mark.slow
def test_a_scan_over_layers_that_recomputes_them_gives_the_same_gradients(model, params):
    scanned = make_model(dataclasses.replace(model.config, unroll=1, remat="full"))
    found = (jax.tree.leaves(gradients(one, params)) for one in (scanned, model))
    for a, e in zip(*found, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())


def test_calibration_finds_the_largest_key_of_every_channel(model, params):
    """Against the keys in a cache of floats; padding, however large its keys, is not read."""
    batches, largest = [tiny.batch(seed=i) for i in range(2)], []
    read = jax.jit(functools.partial(decoding.next_logits, model))
    for b in batches:
        b["segment_ids"] = b["segment_ids"].at[:, -3:].set(0)
        cache = decoding.init_cache(model, *b["tokens"].shape)
        places = b["positions"], b["segment_ids"]
        _, cache = read(params, b["tokens"], *places, cache)
        keys_LBKSH = np.abs([keys_BKSH for keys_BKSH, _ in cache.layers])
        largest.append(keys_LBKSH[:, :, :, :-3].max((1, 3)))
        assert np.any(keys_LBKSH.max((1, 3)) > largest[-1])  # negative control
    for bits, high in ((8, 127), (4, 7)):
        found = calibrate_cache(model, params, iter(batches), bits=bits)
        np.testing.assert_allclose(found[:, :, 0], np.maximum(*largest) / high, rtol=1e-5)


@pytest.fixture(scope="module")
def calibrated(model, params):
    return calibrate_cache(model, params, [tiny.batch(seed=5)])


@pytest.fixture(scope="module")
def after_training(model, params, calibrated):
    """(activations, cache) -> what is trained, what is rounded, and hidden states of a batch."""
    found = {("none", "none"): (Trained(params), None)}
    for kind, cache in (("int8", "int8"), ("int4", "int4")):
        section = tiny.config().quantization
        section.update(activations=kind, cache=cache, bits=4.0)
        scales = {"int8": calibrated, "int4": calibrated * (127 / 7)}[cache]
        found[kind, cache] = quantized_while_running(section, model, params, scales)
    return {
        name: (*pair, jax.jit(make_forward(model, pair[1]))(pair[0], tiny.batch())[0].hidden)
        for name, pair in found.items()
    }


def test_cache_and_activations_are_rounded_after_training(model, params, after_training):
    """4 bits more than 8; the weights are as they were given."""
    hidden = {name: found[2] for name, found in after_training.items()}
    plain = hidden["none", "none"]
    distance = {name: float(np.abs(x - plain).mean()) for name, x in hidden.items()}
    assert 0 < distance["int8", "int8"] < distance["int4", "int4"] / 8
    assert quantized_while_running(tiny.config().quantization, model, params) == (
        Trained(params, jax.tree.map(lambda _: (), params)),
        None,
    )


@pytest.mark.slow
def test_evaluation_after_training_is_of_the_quantized_forward_pass(model, after_training):
    """Beside the loss of the plain one."""
    b, (trained, quantized, hidden) = tiny.batch(), after_training["int4", "int4"]
    sums = jax.jit(make_eval_step(model, 0, quantized))(trained, b)
    plain = after_training["none", "none"][2]
    for name, states in (("quantized_nll", hidden), ("nll", plain)):
        log_p = jax.nn.log_softmax(states @ model.head(trained.params))
        nll = -np.take_along_axis(log_p, b["targets"][..., None], -1)[..., 0]
        np.testing.assert_allclose(sums[name], (b["weights"] * nll).sum(), rtol=1e-5)
    assert abs(sums["quantized_nll"] - sums["nll"]) > 1e-3 * sums["nll"]


def test_the_tap_of_attention_reads_quantized_keys(model, params, calibrated):
    section = tiny.config(quantization__cache="int4").quantization
    trained, quantized = quantized_while_running(section, model, params, 40 * calibrated)
    b = tiny.batch()
    taps = {"attention_to": lambda b: b["tokens"] % 2 == 0}
    found, plain = (
        jax.jit(make_forward(model, q, taps=taps))(trained, b)[0].aux["attention_to"]
        for q in (quantized, None)
    )
    assert np.abs(found - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"quantization__cache": "int5"}, "quantization.cache='int5' is not one of: none, int8"),
        ({"quantization__cache": "int4", "model__head_width": 7}, "a head has 7"),
        ({"quantization__cache": "int8", "quantization__cache_batches": -1}, "cache_batches=-1"),
        (
            {"quantization__cache": "int8", "train__frozen": "nf4", "model__adapter_rank": 2},
            "train.frozen=nf4 needs quantization.cache=none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(overrides, names):
    overrides = {"model__positions": "learned", "quantization__fraction": "1"} | overrides
    with pytest.raises(InputError, match=names):
        experiment.build(tiny.config(**overrides), tiny.VOCAB, jax.devices()[:1])


def test_scales_and_caches_that_do_not_belong_together_are_refused(model, params, calibrated):
    section = tiny.config(quantization__cache="int8").quantization
    with pytest.raises(InputError, match="cache=int8 without scales of keys"):
        quantized_while_running(section, model, params)
    with pytest.raises(InputError, match="cache=none with scales of keys"):
        quantized_while_running(tiny.config().quantization, model, params, calibrated)
    with pytest.raises(InputError, match="at least one batch"):
        calibrate_cache(model, params, [])
    with pytest.raises(InputError, match="not finite"):
        calibrate_cache(model, jax.tree.map(lambda x: x * jnp.nan, params), [tiny.batch()])
    quantizer = make_cache_quantizer(8, model.config.head_width)
    inputs, products = tiny.inputs(tiny.batch()), LayerProducts(cache=quantizer)
    for given, others in ((None, {"products": products}), (quantizer, {})):
        cache = decoding.init_cache(model, *inputs.tokens.shape, given)
        with pytest.raises(InputError, match="by init_cache with the same quantizer"):
            model.apply(params, inputs, cache, **others)


TRAINED = {
    "quantization__cache": "int8",
    "quantization__activations": "int8",
    "quantization__fraction": "0.5",
    "quantization__cache_batches": 1,
    "optimizer__schedule": "wsd",
    "optimizer__decay_fraction": 0.4,
    "train__ema_decay": 0.9,
}


@pytest.mark.slow
def test_a_run_cut_in_its_quantized_phase_is_the_whole_run(tmp_path):
    """Scales of keys are state: trained, averaged, saved. The weights are in full precision."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = tiny.config(data__corpus=corpus, evaluation__sample_tokens=4, **TRAINED)
    train(config, tmp_path / "whole")
    stopped, _ = train(config, tmp_path / "cut", stop_after=4)
    assert 4 <= stopped.step < 6  # the quantized phase begins at step 3
    train(config, tmp_path / "cut")
    for kind in ("train", "validation", "event"):
        assert lines(tmp_path / "cut", kind) == lines(tmp_path / "whole", kind)
    (a, _), (b, _) = (final_state(config, tmp_path / name) for name in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    last = lines(tmp_path / "whole", "validation")[-1]
    assert last["quantized_loss"] == last["loss"] != last["full_precision_loss"]
    # The steps have moved from where calibration has put them, and the average follows.
    data = experiment.load_data(config.data)
    run = experiment.build(config, data.tokenizer.vocab_size)
    first = run.quantized.first_scales(a.trained.params)[KEYS]
    assert a.trained.scales[KEYS].shape == first.shape
    assert np.any(a.trained.scales[KEYS] != a.ema.scales[KEYS])


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    batches = [tiny.batch(rows=8, seed=i) for i in range(2)]
    meshes = {1: {}, 8: {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2}}
    found = []
    for count, mesh in meshes.items():
        options = {**TRAINED, "quantization__activations": "none"}  # which flip codes, too
        config = tiny.config(data__sequence_length=16, **options, **mesh)
        run = experiment.build(config, tiny.VOCAB, jax.devices()[:count])
        with jax.set_mesh(run.mesh):
            shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
            state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
            state = run.begin_quantized()(state)
            step = run.train_step(quantized=True)
            losses = []
            for b in batches:
                state, metrics = step(state, put_batch(run.mesh, b))
                losses.append(jax.device_get(metrics["loss"]))
            scales = calibrate_cache(run.model, state.trained.params, [put_batch(run.mesh, b)])
        found.append((losses, *jax.device_get((state.trained.scales[KEYS], scales))))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    # A key at the edge of two codes may round to either; few do.
    for a, e in zip(*(x[1:] for x in found), strict=True):
        assert np.mean(~np.isclose(a, e, rtol=1e-3)) < 0.1
        np.testing.assert_allclose(a, e, rtol=1e-2)
