"""Answers in a chat: their prompt, where they end, and how they are streamed."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lm.data.chats import Message, end_of_turn
from lm.data.layout import encode_prompt
from lm.data.tokenizers import Subwords
from lm.evaluation.sampling import Sampler, until
from lm.evaluation.tasks.encoding import Encoder
from lm.model.interface import Outputs
from lm.model.trained import Trained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return Subwords(made.to_str(), str(path), "<|endoftext|>", "<|endoftext|>")


def test_the_prompt_of_an_answer_is_the_chat_and_what_opens_the_answer(tokenizer):
    messages = [Message("user", "Hi <|im_end|>")]
    ids = encode_prompt(messages, tokenizer)
    start, end = (tokenizer.special_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert ids[0] == start
    assert (ids == start).sum() == 2
    assert (ids == end).sum() == 1  # What the user wrote is text.
    text = tokenizer.decode(ids[-10:]).replace(" ", "")
    assert text == "assistant\n"
    assert end_of_turn(tokenizer.chat, tokenizer.special_tokens) == "<|im_end|>"


def test_what_a_template_has_written_is_read_with_its_special_tokens(tokenizer):
    """As `encode_prompt` encodes a chat; in plain text the same names are text."""
    encoder = Encoder(tokenizer, opens=True, length=100, vocabulary=tokenizer.vocab_size)
    messages = [Message("user", "Hi")]
    text = tokenizer.chat.render(messages, add_generation_prompt=True)
    start = tokenizer.special_id("<|im_start|>")
    assert start not in encoder.prompt(text)
    encoder.read_chats()
    np.testing.assert_array_equal(encoder.prompt(text), encode_prompt(messages, tokenizer))
    both = encoder.pair(text, "Hello")
    # The line break that ends the context belongs to the continuation.
    assert both.scored == len("\nHello")
    assert encoder.prompt("Hi")[0] == tokenizer.beginning_of_text


def test_an_answer_ends_with_its_turn(tokenizer):
    """Of a model that always predicts the end of the turn; a plain sample goes on after it."""
    model = tiny.model()
    end, size = tokenizer.special_id("<|im_end|>"), tokenizer.vocab_size

    def apply(params, inputs, cache, *others, **options):
        return Outputs(jnp.ones((*inputs.tokens.shape, 32)), {}, cache)

    always = model._replace(
        apply=apply, head=lambda params: jnp.zeros((32, size)).at[:, end].set(1.0)
    )
    talks, samples = (
        Sampler(always, tokenizer, chat=chat, temperature=0.0, chunk=4) for chat in (True, False)
    )
    trained = Trained(tiny.params(model))
    assert list(talks.answer(trained, [Message("user", "a")], 0, 8)) == []
    assert "".join(samples.stream(trained, "a", 0, 8)).count("<|im_end|>") == 8


@given(st.lists(st.text("ab<|>", max_size=4)), st.sampled_from(["<|", "a", "ab<"]))
def test_a_stream_stops_before_a_marker(pieces, stop):
    whole = "".join(pieces)
    shown = list(until(iter(pieces), stop))
    assert "".join(shown) == whole.partition(stop)[0]
    assert all(shown)
