"""Packed files of which activations, keys and values are rounded as well as weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from launch import workdir
from lm.compression import after_training, packed
from lm.compression.cache import calibrate_cache
from lm.compression.phases import default_rules, quantized_while_running
from lm.data import tokenizers
from lm.errors import InputError
from lm.evaluation.sampling import Sampler
from lm.model.config import ModelConfig
from lm.model.transformer import make_model
from lm.training.step import make_eval_step
from objectives.quantization import absmax

TOKENIZER = tokenizers.load("bytes", 0, (), directory="")
CONFIG = tiny.config(data__tokenizer="bytes", model__layers=1)
MODEL = make_model(ModelConfig(vocab_size=TOKENIZER.vocab_size, **CONFIG.model))


@pytest.fixture(scope="module")
def rounded():
    """A fresh model, its weights as they are, and the scales of keys for a cache of 8 bits."""
    params = jax.tree.map(lambda x: 3 * x, tiny.params(MODEL))
    scales = calibrate_cache(MODEL, params, [tiny.batch(seed=3)])
    return after_training.PostTrained(params, {}, {}, scales)


def write(folder, result, **quantization):
    config = CONFIG.copy_and_resolve_references()
    config.quantization.update(bits=8.0, quantizer="absmax", **quantization)
    path = folder / "model.safetensors"
    packed.write_packed(
        path,
        result.leaves(),
        config=config.to_dict(),
        vocab_size=TOKENIZER.vocab_size,
        tokenizer="",
        step=0,  # a model from outside has never made a step here
    )
    return str(path), config.quantization


@pytest.fixture(scope="module")
def written(rounded, tmp_path_factory):
    return write(tmp_path_factory.mktemp("file"), rounded, activations="int8", cache="int8")


def test_a_file_is_evaluated_with_its_activations_and_cache(rounded, written):
    path, section = written
    loaded = workdir.load_packed(path)
    expected, quantized = quantized_while_running(
        section, MODEL, rounded.params, rounded.key_scales
    )
    b = tiny.batch()
    with jax.set_mesh(loaded.run.mesh):
        trained, in_quantized_phase = loaded.run.usable(loaded.state)
        assert in_quantized_phase
        jax.tree.map(np.testing.assert_array_equal, trained, expected)
        sums = loaded.run.eval_step()(trained, b)
        reference = jax.jit(make_eval_step(MODEL, CONFIG.objective.block_size, quantized))
        for name, value in reference(expected, b).items():
            np.testing.assert_allclose(sums[name], value, rtol=1e-6)
        assert abs(sums["quantized_nll"] - sums["nll"]) > 1e-4 * sums["nll"]  # negative control


@pytest.mark.slow
def test_a_file_is_sampled_from_with_its_activations_and_cache(rounded, written):
    path, section = written
    loaded = workdir.load_packed(path)
    expected = quantized_while_running(section, MODEL, rounded.params, rounded.key_scales)
    with jax.set_mesh(loaded.run.mesh):
        given = loaded.run.stored(loaded.state)
        texts = [
            Sampler(MODEL, TOKENIZER, quantized=quantized, temperature=0.0)(trained, "ab", 0, 24)
            for trained, quantized in (given, expected, (expected[0], None))
        ]
    assert texts[0] == texts[1] != texts[2]
    codes = given[1].cache.empty((1, 1, 2, 4, 8))
    assert [x.dtype for x in codes] == [jnp.int8, jnp.int8, jnp.float32]


def test_a_file_without_them_is_as_before(rounded, tmp_path):
    """Nothing is rounded while it runs, and no program knows of it."""
    path, _ = write(tmp_path, rounded._replace(key_scales=None))
    loaded = workdir.load_packed(path)
    assert loaded.run.quantized is None
    trained, quantized = loaded.run.stored(loaded.state)
    assert quantized is None
    assert trained.scales == ()
    # A file from before there was such a key.
    old = packed.read_packed(path)
    del old.config["quantization"]["cache"], old.config["quantization"]["cache_batches"]
    packed.write_packed(
        path,
        rounded._replace(key_scales=None).leaves(),
        config=old.config,
        vocab_size=old.vocab_size,
        tokenizer="",
        step=0,
    )
    assert workdir.load_packed(path).config.quantization.cache == "none"


@pytest.mark.parametrize("cache", ["none", "int8"])
def test_scales_that_do_not_fit_the_config_are_refused(rounded, tmp_path, cache):
    scales = {"none": rounded.key_scales, "int8": None}[cache]
    path, _ = write(tmp_path, rounded._replace(key_scales=scales), cache=cache)
    with pytest.raises(InputError, match=f"do not fit quantization.cache={cache}"):
        workdir.load_packed(path)


def test_a_file_of_trained_scales_needs_no_calibration(rounded, tmp_path):
    """What `code_leaves` gives of a run's own scales is what `PostTrained` gives."""
    params, rules = rounded.params, default_rules(8, absmax)
    trained, _ = quantized_while_running(
        tiny.config(quantization__cache="int8").quantization, MODEL, params, rounded.key_scales
    )
    result = after_training.put_on_grids(params, trained.scales, rules)
    np.testing.assert_array_equal(result.key_scales, rounded.key_scales)
    names = [name for name, _ in packed.code_leaves(params, trained.scales, rules)]
    assert names == [name for name, _ in result.leaves()]
    assert names[-1] == packed.KEY_SCALES
    path, _ = write(tmp_path, after_training.with_scales(result, "float16"), cache="int8")
    found = workdir.load_packed(path).state.trained.scales
    np.testing.assert_array_equal(found["cache"], rounded.key_scales)
