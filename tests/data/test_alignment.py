"""Common byte boundaries of two tokenizations, on arrays and on real tokenizers."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.data import tokenizers
from lm.data.alignment import at_starts, chunk_sums, common_ends, spaces
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document

TEXT = "def f(x):\n    if x > 100:\n\t\treturn [x, 'naïve — ☃ 🎉', 2024]\n\n\n        # more\n" * 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two byte-pair encodings and bytes."""
    corpus = (Corpus("fake", [Document("0", ((TEXT, 1.0),))], "fake text", 0),)
    folder = str(tmp_path_factory.mktemp("bpe"))
    found = {
        str(size): tokenizers.load("bpe", size, corpus, directory=folder) for size in (270, 300)
    }
    return found | {"bytes": tokenizers.Bytes()}


def test_boundaries_by_hand():
    """Text of six bytes, ab|c|def and a|bc|de|f: they meet after abc and at the end."""
    own, other = np.asarray([2, 1, 3, 0]), np.asarray([1, 2, 2, 1, 0])
    ends = common_ends(own, other)
    np.testing.assert_array_equal(ends[0], [1, 2, 3])
    np.testing.assert_array_equal(ends[1], [1, 3, 4])
    values = np.asarray([1.0, 2, 4, 8, 16])
    np.testing.assert_array_equal(chunk_sums(values, ends, 4), [np.nan, 3, 12, 16])
    np.testing.assert_array_equal(at_starts(values, ends, 4), [1, np.nan, 4, 16])
    wide = np.stack([values, -values], -1)
    np.testing.assert_array_equal(at_starts(wide, ends, 4)[[0, 2]], [[1, -1], [4, -4]])


def test_a_character_in_several_tokens_ends_with_the_last_of_them():
    """Where offsets are of characters, the first token has all bytes and the others none."""
    ends = common_ends(np.asarray([3, 0, 0, 1, 0]), np.asarray([0, 1, 1, 1, 1, 0]))
    np.testing.assert_array_equal(ends[0], [2, 3, 4])
    np.testing.assert_array_equal(ends[1], [3, 4, 5])


@pytest.mark.parametrize("sizes", [([0], [0]), ([0, 0], [0])])
def test_an_empty_document_has_its_end(sizes):
    ends = common_ends(*map(np.asarray, sizes))
    assert [places.tolist() for places in ends] == [[len(size) - 1] for size in sizes]


def test_tokens_that_begin_with_a_space_are_those_that_decode_to_one(pair):
    for tokenizer in pair.values():
        found = spaces(tokenizer)
        assert found[tokenizer.end_of_text]
        for token in range(tokenizer.vocab_size):
            if token != tokenizer.end_of_text:
                text = tokenizer.decode(np.asarray([token]))
                assert found[token] == text.startswith((" ", "\n", "\t"))
        assert 3 < found.sum() < 100


def test_a_tokenizer_that_drops_text_meets_nowhere():
    ends = common_ends(np.asarray([1, 1, 0]), np.asarray([0]))
    assert not len(ends[0])
    assert np.isnan(chunk_sums(np.ones(1), ends, 3)).all()
    assert np.isnan(at_starts(np.ones((1, 4)), ends, 3)).all()


@pytest.mark.parametrize("names", [("bytes", "300"), ("300", "bytes"), ("270", "300")])
@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60), prompt=st.sampled_from(["", "def f(x):", "naï"]))
@example(text="", prompt="")
@example(text="e\u0301 🎉🎉 👩‍👩‍👧 \x00 return [x", prompt="if x")
@example(text=TEXT[:200], prompt="")
def test_pieces_between_boundaries_are_the_same_text(pair, names, text, prompt):
    document = Document("0", ((prompt, 0.0), (text, 1.0)))
    own, other = (encode_document(document, pair[name]) for name in names)
    own_ends, other_ends = common_ends(own["num_bytes"], other["num_bytes"])
    assert own_ends[-1] == len(own) - 1
    assert other_ends[-1] == len(other) - 1
    assert (np.diff(own_ends) > 0).all()
    covered = [np.cumsum(one["num_bytes"]) for one in (own, other)]
    np.testing.assert_array_equal(covered[0][own_ends], covered[1][other_ends])
    # None is missing: no other own boundary is one of the other tokenization.
    inner = np.setdiff1d(np.arange(len(own) - 1), own_ends)
    assert not np.isin(covered[0][inner], covered[1][:-1]).any()
    starts = [np.append(0, ends[:-1] + 1) for ends in (own_ends, other_ends)]
    for a, b, c, d in zip(starts[0], own_ends, starts[1], other_ends, strict=True):
        texts = [
            pair[name].decode(one["targets"][first : last + 1])
            for name, one, first, last in zip(names, (own, other), (a, c), (b, d), strict=True)
        ]
        assert texts[0] == texts[1]
    values = np.random.default_rng(0).standard_normal(len(other))
    sums = chunk_sums(values, (own_ends, other_ends), len(own))
    np.testing.assert_allclose(np.nansum(sums), values.sum(), atol=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(sums)), own_ends)
