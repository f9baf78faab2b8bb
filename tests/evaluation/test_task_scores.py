"""Log-likelihoods and answers of a tiny model, against dense NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from lm.data import tokenizers
from lm.errors import InputError
from lm.evaluation.tasks.encoding import Encoder, Ids, adds_beginning
from lm.evaluation.tasks.scoring import Scorer
from lm.evaluation.tasks.writing import Asked, Writer
from lm.model.interface import Tokens
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import make_mesh

BYTES = tokenizers.load("bytes", 0, (), directory="")
LENGTH = 40


@pytest.fixture(scope="module")
def model():
    config = tiny.model(layers=1).config
    return make_model(dataclasses.replace(config, vocab_size=BYTES.vocab_size))


@pytest.fixture(scope="module")
def trained(model):
    return Trained(tiny.params(model))


@pytest.fixture(scope="module")
def log_p(model, trained):
    """(tokens) -> log-softmax of the logits in float64, [T, V], of rows padded to `LENGTH`."""

    @jax.jit
    def logits(row_1T):
        positions = np.arange(LENGTH, dtype=np.int32)[None]
        inputs = Tokens(row_1T, positions, np.ones_like(positions))
        return model.apply(trained.params, inputs).hidden @ model.head(trained.params)

    def of(tokens):
        row_1T = np.zeros((1, LENGTH), np.int32)
        row_1T[0, : len(tokens)] = tokens
        z_TV = np.asarray(logits(row_1T)[0, : len(tokens)], np.float64)
        z_TV -= z_TV.max(axis=1, keepdims=True)
        return z_TV - np.log(np.exp(z_TV).sum(axis=1, keepdims=True))

    return of


def mesh(count=1, **sizes):
    return make_mesh(
        {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes, jax.devices()[:count]
    )


def texts(log_p):
    """Texts of many lengths; the last ends as the model would write it."""
    rng = np.random.default_rng(0)
    made = [
        Ids(rng.integers(0, 257, size).astype(np.int32), scored)
        for size, scored in [(2, 1), (9, 8), (33, 5), (34, 2), (5, 2), (20, 19)]
    ]
    greedy = list(made[1].tokens)
    for _ in range(3):
        greedy.append(int(np.argmax(log_p(greedy)[-1])))
    return [*made, Ids(np.array(greedy, np.int32), 3)]


def test_log_probabilities_are_those_of_a_dense_softmax(model, trained, log_p):
    asked = texts(log_p)
    one = mesh()
    with jax.set_mesh(one):
        found = Scorer(model, one, greedy=True)(trained, asked)
    for text, scored in zip(asked, found, strict=True):
        of_T = log_p(text.tokens[:-1])
        places = np.arange(len(of_T))
        expected = of_T[places, text.tokens[1:]][-text.scored :]
        np.testing.assert_allclose(scored.log_probabilities, expected, rtol=1e-5, atol=1e-5)
        best = of_T.argmax(axis=1)[-text.scored :]
        assert scored.greedy == bool((best == text.tokens[-text.scored :]).all())
    assert [one.greedy for one in found] == [False] * 6 + [True]


@pytest.mark.slow
def test_a_mesh_changes_no_log_probability(model, trained, log_p):
    asked = texts(log_p)
    one, many = mesh(), mesh(8, data=2, fsdp=2, sequence=2)
    found = []
    for each in (one, many):
        with jax.set_mesh(each):
            found.append(Scorer(model, each)(trained, asked))
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(here.log_probabilities, there.log_probabilities, atol=1e-5)


def test_answers_are_those_of_the_likeliest_token(model, trained, log_p):
    one = mesh()
    prompts = [BYTES.encode("ab")[0], BYTES.encode("hello, you")[0]]
    expected = []
    for ids in prompts:
        tokens = list(ids)
        for _ in range(6):
            tokens.append(int(np.argmax(log_p(tokens)[-1])))
        expected.append(BYTES.decode(np.array(tokens[len(ids) :])))
    asked = [Asked(ids, (), 6) for ids in prompts]
    stop = expected[1][2:4]
    asked.append(Asked(prompts[1], (stop,), 6))
    with jax.set_mesh(one):
        found = Writer(model, one, BYTES)(trained, asked)
    assert found[:2] == expected
    assert found[2] == expected[1][: expected[1].index(stop)]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    encoder = Encoder(BYTES, True, 32, 257)
    found = encoder.pair("ab  ", "c")
    assert found.scored == 3
    assert found.tokens.tolist() == [256, 97, 98, 32, 32, 99]
    assert Encoder(BYTES, False, 32, 257).pair("ab", "c").tokens.tolist() == [97, 98, 99]
    # With nothing before it, a continuation follows the beginning of text either way.
    assert Encoder(BYTES, False, 32, 257).pair("", "c").tokens.tolist() == [256, 99]
    assert Encoder(BYTES, False, 32, 257).pair("  ", "c").scored == 3


def test_a_context_that_is_too_long_loses_its_beginning():
    encoder = Encoder(BYTES, True, 4, 257)
    assert encoder.pair("abcdef", "gh").tokens.tolist() == list(b"defgh")
    assert encoder.is_cut("abcdef", "gh")
    assert not encoder.is_cut("ab", "gh")
    with pytest.raises(InputError, match="has 5 tokens; the model reads 4"):
        encoder.pair("a", "bcdef")
    with pytest.raises(InputError, match="has no tokens of its own"):
        encoder.pair("a", "")


@pytest.mark.parametrize("stride", [0, 1, 3, 4])
@pytest.mark.parametrize("size", [1, 4, 5, 9, 10])
def test_windows_predict_every_token_once_with_the_context_that_is_asked_for(size, stride):
    """As `lm_eval.utils.get_rolling_token_windows` with max_seq_len 4, context_len 5 - stride."""
    text, length = "abcdefghij"[:size], 4
    found = list(Encoder(BYTES, True, length, 257).windows(text, stride))
    whole, place = [256, *text.encode()], 1
    for number, window in enumerate(found):
        assert len(window.tokens) <= length + 1
        end = place + window.scored
        assert window.tokens.tolist() == whole[max(end - length - 1, 0) : end]
        if number and end < len(whole):
            assert window.scored == (stride or length)
        place = end
    assert place == len(whole)
    assert not list(Encoder(BYTES, True, length, 257).windows(""))


def test_a_stride_longer_than_a_window_is_refused():
    with pytest.raises(InputError, match="stride=5 is more than the 4 tokens"):
        list(Encoder(BYTES, True, 4, 257).windows("abc", 5))


def test_an_id_without_a_row_is_refused():
    with pytest.raises(InputError, match="the model has a table of 98"):
        Encoder(BYTES, True, 4, 98).encode("abc")
    assert adds_beginning(BYTES)
