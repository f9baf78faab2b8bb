"""Text of tokens that come one after the other."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data.declared import END_OF_TEXT
from lm.data.partial_text import PartialText
from lm.data.tokenizers import Bytes, Subwords


def byte_fallback():
    """A tokenizer with words, and with bytes for all else, as those of SentencePiece have."""
    import tokenizers

    pieces = ["<unk>", END_OF_TEXT, "▁a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    model = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    built = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Subwords(built.to_str(), "here", END_OF_TEXT), 4  # the id of the byte 0


TOKENIZERS = {"bytes": (Bytes(), 0), "byte_fallback": byte_fallback()}


def pieces(tokenizer, ids):
    text = PartialText(tokenizer)
    return [text.extend(np.array(ids[:n]), n == len(ids)) for n in range(1, len(ids) + 1)]


def test_a_character_comes_with_its_last_byte():
    assert pieces(Bytes(), list("né☃".encode())) == ["n", "", "é", "", "", "☃"]
    # At the end nothing is held back.
    assert pieces(Bytes(), list("é☃".encode())[:-1]) == ["", "é", "", "\ufffd"]


def test_bytes_that_a_later_byte_would_change_are_held_back():
    tokenizer, zero = TOKENIZERS["byte_fallback"]
    ids = [2, *(zero + byte for byte in "é".encode()), zero + 0xFF]
    assert tokenizer.decode(np.array(ids[:3])) == " aé"
    assert tokenizer.decode(np.array(ids)) == " a\ufffd\ufffd\ufffd"
    assert pieces(tokenizer, ids) == [" a", "", "", "\ufffd\ufffd\ufffd"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*"é☃🎉a".encode(), 0xFF]), min_size=1, max_size=12), st.data())
def test_the_pieces_are_the_text_of_all_tokens(name, content, data):
    tokenizer, zero = TOKENIZERS[name]
    ids = [zero + byte for byte in content]
    if name == "byte_fallback":
        words = data.draw(st.lists(st.sampled_from([2, 3]), max_size=12))
        ids = [i for pair in itertools.zip_longest(ids, words) for i in pair if i is not None]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(np.array(ids))
