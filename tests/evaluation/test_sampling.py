"""Text samples: where they end, and that the pieces of a stream are the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.data.tokenizers import Bytes
from lm.evaluation import sampling
from lm.model import decoding
from lm.model.config import ModelConfig
from lm.model.trained import Trained
from lm.model.transformer import make_model

STEPS, PROMPT, BOUNDARY = 40, "naïve", Bytes.boundary


@pytest.fixture(scope="module")
def model():
    c = tiny.config(model__norm="layernorm", model__layers=1).model
    return make_model(ModelConfig(vocab_size=Bytes.vocab_size, **c))


@pytest.fixture(scope="module")
def trained(model):
    """Parameters that give the end of text a logit of 3, and other tokens about N(0, 1)."""
    params = tiny.params(model)
    norm, kernel = params["final_norm"], params["head"]["kernel"]
    norm["scale"], norm["bias"] = norm["scale"].at[0].set(0), norm["bias"].at[0].set(1)
    params["head"]["kernel"] = kernel.at[0].set(0).at[:, BOUNDARY].set(0).at[0, BOUNDARY].set(3)
    return Trained(params)


@pytest.fixture(scope="module")
def texts(model, trained):
    """The text of each seed, and what the model gives without an end, cut at its first end."""
    sampler = sampling.make_sampler(model, Bytes(), temperature=0.8)
    prompt = np.array([[BOUNDARY, *PROMPT.encode()]], np.int32)

    @jax.jit
    def generate(params, key):
        mask = jnp.ones_like(prompt)
        return decoding.generate(model, params, prompt, mask, key, steps=STEPS, temperature=0.8)

    found = {}
    for seed in range(6):
        tokens = np.asarray(generate(trained.params, jax.random.key(seed)))[0]
        ends = np.flatnonzero(tokens == BOUNDARY)
        cut = Bytes().decode(tokens[: ends[0]] if len(ends) else tokens)
        found[seed] = sampler(trained, PROMPT, seed, STEPS), PROMPT + cut, len(ends) > 0
    return found


def test_a_text_is_what_the_model_gives_up_to_its_end(texts):
    for text, expected, _ in texts.values():
        assert text == expected
    assert {ended for *_, ended in texts.values()} == {True, False}
    assert any("\ufffd" in text for text, *_ in texts.values())


def test_the_pieces_of_a_stream_are_the_whole_text(model, trained, texts):
    stream = sampling.make_stream(model, Bytes(), temperature=0.8)
    for seed, (text, *_) in texts.items():
        for chunk in (1, 3):
            pieces = list(stream(trained, PROMPT, seed, STEPS, chunk))
            assert PROMPT + "".join(pieces) == text
            if chunk == 1 and len(text) > 20:
                assert len(pieces) > 5
