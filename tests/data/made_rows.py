"""Documents of letters, batches of them, and what their rows hold."""

from collections import Counter

import numpy as np

from lm.data.batches import train_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes

TYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "num_bytes": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "sample_ids": np.int32,
    "sample_positions": np.int32,
}


def corpus_of(documents, name="fake"):
    documents = [
        Document(str(i), document if isinstance(document, tuple) else ((document, 1.0),))
        for i, document in enumerate(documents)
    ]
    return Corpus(name, documents, name, 0)


def letter_documents(count, seed=0):
    """Documents that differ in their first byte, of 0 to 50 bytes."""
    rng = np.random.default_rng(seed)
    return [chr(i % 90 + 33) + "abcdefg" * rng.integers(0, 8) for i in range(count)]


def training_batches(corpora, **changes):
    arguments = {
        "batch_size": 4,
        "sequence_length": 16,
        "packing": "concat",
        "seed": 0,
        "shuffle_rows": 1,
    }
    return train_batches(corpora, Bytes(), **(arguments | changes))


def rows_of(batches):
    for batch in batches:
        for i in range(len(batch["tokens"])):
            yield {name: x_BT[i] for name, x_BT in batch.items()}


def segments_of(rows):
    """The pieces of documents in rows, each as (tokens, targets, weights, num_bytes)."""
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            where = row["segment_ids"] == segment
            yield tuple(
                tuple(row[name][where].tolist())
                for name in ("tokens", "targets", "weights", "num_bytes")
            )


def targets_of(rows):
    """Every (token, target, weight, bytes) that is not padding, with how often it occurs."""
    return Counter(
        position for segment in segments_of(rows) for position in zip(*segment, strict=True)
    )


def expected_targets(documents):
    encoded = [encode_document(document, Bytes()) for document in documents]
    return Counter(tuple(position.tolist()) for document in encoded for position in document)


def assert_rows_are_sound(batch):
    """What attention and the loss rely on."""
    assert {name: x_BT.dtype for name, x_BT in batch.items()} == TYPES
    padding_BT = batch["segment_ids"] == 0
    for name in TYPES:
        np.testing.assert_array_equal(batch[name][padding_BT], -1 if name == "sample_ids" else 0)
    steps = np.diff(batch["segment_ids"], axis=1)
    ends = np.diff(padding_BT.astype(int), axis=1)
    assert (ends >= 0).all()  # Padding comes last.
    assert np.isin(steps[~padding_BT[:, 1:]], (0, 1)).all()  # Segments count up, without gaps.
    assert np.isin(batch["segment_ids"][:, 0], (0, 1)).all()
    inside = (steps == 0) & ~padding_BT[:, 1:]
    np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
    np.testing.assert_array_equal(
        batch["positions"][:, 1:][inside], batch["positions"][:, :-1][inside] + 1
    )
    np.testing.assert_array_equal(
        batch["sample_ids"][:, 1:][inside], batch["sample_ids"][:, :-1][inside]
    )
    assert not batch["positions"][:, 1:][~inside].any()
    assert not batch["positions"][:, 0].any()
