"""A long document is tokenized as far as rows are asked for; its rows are those of the whole."""

import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import cuts
from lm.data.batches import check_enough, train_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes, Subwords

WORDS = [
    "it's",
    "",
    "the",
    "12345",
    "naïve\n\n",
    "",
    "words",
    "—",
    "of\ta",
    "",
    "(b)",
    "日本",
    "x1",
    "end.\r\n",
    "A",
]
TEXT = st.lists(st.sampled_from(["", *WORDS, "\n", "\u00a0", "'ll"]), max_size=40).map(" ".join)


def byte_level(pattern=None, **changes):
    """A small byte-level tokenizer; without a pattern it has that of GPT-2."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    built = tokenizers.Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    built.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator([" ".join(WORDS) * 3], trainer)
    return Subwords(json.dumps(json.loads(built.to_str()) | changes), "tokenizer.json")


TOKENIZERS = {
    "bytes": Bytes(),
    "gpt2": byte_level(),
    **{f"pattern {i}": byte_level(pattern) for i, pattern in enumerate(cuts.CUTTING)},
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(cuts, "PIECE", 5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_identical_to_the_whole(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    monkeypatch.setattr(cuts, "PIECE", 5)
    most = 0

    @settings(max_examples=60, deadline=None)
    @given(TEXT)
    def check(text):
        nonlocal most
        pieces = list(tokenizer.encode_pieces(text))
        most = max(most, len(pieces))
        for joined, whole in zip(zip(*pieces, strict=True), tokenizer.encode(text), strict=True):
            np.testing.assert_array_equal(np.concatenate(joined), whole)

    check()
    assert most > 2


def test_a_tokenizer_that_may_join_what_a_cut_parts_gets_the_whole(short):
    text = "one two three four five six"
    assert len(list(TOKENIZERS["gpt2"].encode_pieces(text))) > 2  # Negative control.
    unknown = byte_level(r"\w+ \w+|\s+|.")  # A word may hold a space.
    assert len(list(unknown.encode_pieces(text))) == 1
    added = {"id": 330, "content": "e t", "special": False, "single_word": False}
    added |= {"lstrip": False, "rstrip": False, "normalized": False}
    end = json.loads(TOKENIZERS["gpt2"].definition)["added_tokens"]
    assert len(list(byte_level(added_tokens=[*end, added]).encode_pieces(text))) == 1
    assert len(list(byte_level(normalizer={"type": "NFC"}).encode_pieces(text))) == 1


class Counting(Bytes):
    """Bytes, and how many of them were encoded."""

    def __init__(self):
        self.count = 0

    def encode(self, text):
        self.count += len(text)
        return super().encode(text)


def corpus(*texts):
    spans = (((text[:7], 0.0), (text[7:], 1.0)) for text in texts)
    documents = [Document(str(i), each) for i, each in enumerate(spans)]
    return (Corpus("c", documents, "c", 0),)


def batches(texts, packing, tokenizer, **changes):
    options = {"batch_size": 2, "sequence_length": 16, "packing": packing, "seed": 0}
    return iter(train_batches(texts, tokenizer, **(options | {"shuffle_rows": 4} | changes)))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_more_of_a_document_is_tokenized_than_its_rows_need(packing):
    tokenizer = Counting()
    texts = corpus("ab" * 2_000_000)
    check_enough(texts, tokenizer, batch_size=2, sequence_length=16)
    next(batches(texts, packing, tokenizer))
    assert 0 < tokenizer.count <= 4 * (cuts.PIECE + 7)


@pytest.mark.parametrize("packing", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
@pytest.mark.parametrize("name", tiny.mostly_slow(["bytes", "gpt2"], ("gpt2",)))
def test_rows_and_states_are_those_of_the_whole_documents(packing, name, monkeypatch):
    texts = corpus(*(" ".join(WORDS) * i for i in (1, 9, 2, 30)))
    tokenizer = TOKENIZERS[name]
    whole = batches(texts, packing, tokenizer)
    expected = []
    for _ in range(60):
        expected.append((whole.get_state(), next(whole)))
    monkeypatch.setattr(cuts, "PIECE", 20)
    lazy = batches(texts, packing, tokenizer)
    for state, batch in expected:
        assert json.loads(json.dumps(lazy.get_state())) == json.loads(json.dumps(state))
        found = next(lazy)
        for key in batch:
            np.testing.assert_array_equal(found[key], batch[key], strict=True)
    # A state of either is one of the other, also amid a long document.
    for i in (1, 17, 43):
        again = batches(texts, packing, tokenizer)
        again.set_state(json.loads(json.dumps(expected[i][0])))
        for _, batch in expected[i : i + 5]:
            np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])


def test_an_empty_span_and_an_empty_document_have_their_end(short):
    for spans in ((("", 1.0),), (("ab", 0.0), ("", 1.0)), (("", 0.5), ("abcdefghijkl", 0.0))):
        positions = encode_document(Document("d", spans), Bytes())
        assert len(positions) == sum(len(text) for text, _ in spans) + 1
        assert positions["tokens"][0] == positions["targets"][-1] == 256
        assert positions["weights"][-1] == spans[-1][1]
