import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.cache import first_key_scales
from lm.compression.phases import make_quantized, quantized_while_running
from lm.data import tokenizers
from lm.data.partial_text import PartialText
from lm.evaluation.sampling import Sampler
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.training.forward import make_forward

TOKENIZER = tokenizers.load("bytes", 0, (), directory="")


@pytest.fixture(scope="module")
def model():
    config = tiny.model(layers=1).config
    return make_model(dataclasses.replace(config, vocab_size=TOKENIZER.vocab_size))


@pytest.fixture(scope="module")
def trained(model):
    return Trained(tiny.params(model))


def saying(model, text):
    """The model, but after a prompt of one byte it continues with `text` and the end."""
    ids = jnp.asarray([*TOKENIZER.encode(text)[0], TOKENIZER.end_of_text])

    def apply(params, inputs, cache=None, **options):
        outputs = model.apply(params, inputs, cache, **options)
        place = jnp.clip(cache.length + inputs.tokens.shape[1] - 2, 0, len(ids) - 1)
        one_hot = jax.nn.one_hot(ids[place], model.config.vocab_size)
        shape = (*inputs.tokens.shape, model.config.vocab_size)
        return outputs._replace(hidden=jnp.broadcast_to(one_hot, shape))

    return model._replace(apply=apply, head=lambda params: jnp.eye(model.config.vocab_size))


def test_pieces_are_whole_characters_and_make_up_the_text(model, trained):
    """The characters of two and three bytes are cut by every chunk of one token."""
    text = "aé€b"
    sampler = Sampler(saying(model, text), TOKENIZER, temperature=0.0, chunk=1)
    pieces = list(sampler.stream(trained, "x", 0, 40))
    assert pieces == ["a", "é", "€", "b"]
    assert sampler(trained, "x", 0, 40) == "x" + text
    # Cut in the middle of a character, what is there is shown.
    assert sampler(trained, "x", 0, 2) == "xa\ufffd"


@pytest.mark.slow
def test_chunks_change_no_text(model, trained):
    texts = {
        Sampler(model, TOKENIZER, temperature=1.0, chunk=chunk)(trained, "ab", 3, 20)
        for chunk in (1, 7, 64)
    }
    assert len(texts) == 1
    assert Sampler(model, TOKENIZER, temperature=1.0)(trained, "ab", 4, 20) not in texts


def test_a_sampler_of_the_quantized_phase_has_no_second_model(model, trained):
    """It draws what the model on its grids would draw; the weights given are those of training."""
    section = tiny.config(quantization__bits=2.0).quantization
    quantized = make_quantized(section, trained.params)
    trained = trained._replace(scales=quantized.first_scales(trained.params))
    sampler = Sampler(model, TOKENIZER, quantized=quantized, temperature=0.0)
    on_grid = Trained(quantized.on_grid(trained))
    expected = Sampler(model, TOKENIZER, temperature=0.0)(on_grid, "ab", 0, 24)
    assert sampler(trained, "ab", 0, 24) == expected
    assert Sampler(model, TOKENIZER, temperature=0.0)(trained, "ab", 0, 24) != expected


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("int4", "int4"), pytest.param("int8", "none", marks=pytest.mark.slow)],
)
def test_activations_and_cache_are_rounded_while_sampling(model, trained, kind, cache):
    """The text is that of passes over all of it, activations, keys and values rounded in each."""
    section = tiny.config(quantization__activations=kind, quantization__cache=cache).quantization
    params = jax.tree.map(lambda x: 3 * x, trained.params)  # so that rounding changes a text
    steps = None if cache == "none" else first_key_scales(model, params, 4)
    trained, quantized = quantized_while_running(section, model, params, steps)
    forward, plain = (jax.jit(make_forward(model, q)) for q in (quantized, None))
    ids = [TOKENIZER.beginning_of_text, *TOKENIZER.encode("ab")[0]]
    length, start, same = 16, len(ids), []
    for end in range(start, length):
        row = jnp.zeros((1, length), jnp.int32).at[0, :end].set(jnp.asarray(ids))
        b = {"tokens": row, "positions": jnp.arange(length)[None], "segment_ids": row * 0 + 1}
        outputs, head = forward(trained, b)
        ids.append(int(jnp.argmax(outputs.hidden[0, end - 1] @ head)))
        in_floats = jnp.argmax(plain(trained, b)[0].hidden[0, end - 1] @ head)
        same.append(int(in_floats) == ids[-1])
    expected = PartialText(TOKENIZER).extend(np.array(ids[start:], np.int32), True)
    sampler = Sampler(model, TOKENIZER, quantized=quantized, temperature=0.0)
    found = "".join(sampler.stream(trained, "ab", 0, length - start))
    assert found == expected
    assert not all(same)  # negative control: floats would have gone on otherwise


def test_programs_are_compiled_once(model, trained):
    sampler = Sampler(model, TOKENIZER, temperature=1.0)
    for seed in range(3):
        sampler(trained, "ab", seed, 20)
    # 0: put out of a full cache of the whole process.
    assert max(sampler._start._cache_size(), sampler._advance._cache_size()) <= 1
    np.testing.assert_equal(sampler(trained, "ab", 0, 20), sampler(trained, "ab", 0, 20))
