"""Rows: how documents are laid out and packed, and that nothing is lost or repeated."""

import itertools
from collections import Counter

import grain
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import (
    assert_rows_are_sound,
    corpus_of,
    letter_documents,
    rows_of,
    segments_of,
    targets_of,
    training_batches,
)

from lm.data import packing
from lm.data.batches import evaluation_batches
from lm.data.documents import Document
from lm.data.layout import POSITION, add_fields, encode_document, make_row
from lm.data.tokenizers import Bytes
from lm.errors import InputError


def test_layout_of_a_prompt_and_its_response():
    document = Document("d", (("ab", 0.0), ("é", 1.0)))
    positions = encode_document(document, Bytes())
    assert positions["tokens"].tolist() == [256, 97, 98, 195, 169]
    assert positions["targets"].tolist() == [97, 98, 195, 169, 256]
    assert positions["weights"].tolist() == [0, 0, 1, 1, 1]
    assert positions["num_bytes"].tolist() == [1, 1, 1, 1, 0]


def test_layout_of_an_empty_document():
    positions = encode_document(Document("d", (("", 1.0),)), Bytes())
    assert positions.tolist() == [(256, 256, 1.0, 0)]


def test_ids_outside_the_vocabulary_are_refused():
    class Wrong(Bytes):
        vocab_size = 98

    with pytest.raises(
        InputError, match=r"data\.tokenizer: gives ids from 97 to 99 for document d"
    ):
        encode_document(Document("d", (("abc", 1.0),)), Wrong())
    with pytest.raises(InputError, match=r"data\.tokenizer"):
        list(evaluation_batches([corpus_of(["abc"])], Wrong(), batch_size=1, sequence_length=8))


def test_a_row_of_no_pieces_is_padding():
    assert not any(array.any() for array in make_row([], 4).values())
    row = make_row([add_fields(np.zeros(1, POSITION), sample_ids=np.int32(7))], 3)
    assert row["sample_ids"].tolist() == [7, -1, -1]


@pytest.mark.parametrize("mode", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(1, 17),
    open_rows=st.sampled_from([1, 3, 128]),
)
def test_packing_loses_and_repeats_nothing(mode, lengths, length, open_rows):
    documents = []
    for i, size in enumerate(lengths):
        document = np.zeros(size, POSITION)
        document["tokens"] = i
        document["targets"] = np.arange(size)
        document["weights"] = 0.5
        documents.append(document)
    source = grain.MapDataset.source(documents).to_iter_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_OPEN_ROWS", open_rows)
        rows = list(packing.pack(source, mode, length))
    found = targets_of(rows)
    assert found == Counter(
        (i, offset, 0.5, 0) for i, size in enumerate(lengths) for offset in range(size)
    )
    if mode == "concat":
        filled = [np.count_nonzero(row["segment_ids"]) for row in rows]
        assert filled[:-1] == [length] * (len(rows) - 1)
    else:
        pieces = sum(-(-size // length) for size in lengths)  # Whole where they fit.
        assert len(list(segments_of(rows))) == pieces


@pytest.mark.parametrize("mode", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [1, 16, 64])
def test_rows_of_batches_are_sound(mode, length):
    corpus = corpus_of([*letter_documents(40), (("prompt", 0.0), ("answer", 1.0))])
    batches = iter(training_batches([corpus], packing=mode, sequence_length=length))
    for batch in itertools.islice(batches, 30):
        assert batch["tokens"].shape == (4, length)
        assert_rows_are_sound(batch)


def test_soundness_is_not_a_matter_of_course():
    batch = next(iter(training_batches([corpus_of(letter_documents(40))])))
    for name in ("targets", "positions", "segment_ids"):
        broken = batch | {name: np.roll(batch[name], 1, axis=1)}
        with pytest.raises(AssertionError):
            assert_rows_are_sound(broken)


def test_only_prompts_and_padding_weigh_nothing():
    corpus = corpus_of([(("??????", 0.0), ("!!!!", 1.0))] * 20)
    batches = evaluation_batches([corpus], Bytes(), batch_size=4, sequence_length=16)
    for row in rows_of(batches):
        prompt = row["targets"] == ord("?")
        padding = row["segment_ids"] == 0
        np.testing.assert_array_equal(row["weights"] == 0, prompt | padding)
