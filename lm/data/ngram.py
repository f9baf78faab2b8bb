"""A Witten-Bell byte n-gram: what counting alone achieves, to hold a language model against.

P(w | h) = (c(h, w) + T(h) P(w | h')) / (c(h) + T(h)), where c counts, T(h) is the number of
distinct continuations of the history h, and h' is h without its oldest symbol; below the empty
history lies the uniform distribution (Witten and Bell 1991; Chen and Goodman 1998, section 2.5).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lm.errors import InputError

_BOUNDARY = 256  # Opens and closes every document.
_SYMBOLS = 257
_BITS = 9  # Of one symbol in a packed history; seven symbols fit in 64 bits.
_MAX_ORDER = 64 // _BITS


class _Counts(NamedTuple):
    """Counts of one order, sorted for binary search."""

    grams: np.ndarray  # uint64 [N], histories with their last symbol
    gram_counts: np.ndarray  # int64 [N], c(h, w)
    histories: np.ndarray  # uint64 [M]
    totals: np.ndarray  # int64 [M], c(h)
    distinct: np.ndarray  # int64 [M], T(h)


def witten_bell_bits_per_byte(
    train_texts: Iterable[bytes], validation_texts: Iterable[bytes], order: int
) -> float:
    """Returns the bits per byte of a byte n-gram, fitted on one set of texts, on another.

    Every document opens with boundaries as its history and closes with one that is predicted and
    paid for, as it is for the language model; the bits of all are divided by the bytes of the text.

    Args:
      train_texts: documents to count.
      validation_texts: documents to predict.
      order: symbols of an n-gram, 1 to 7. Memory is about 60 bytes for each byte of text.

    Raises:
      InputError: the order is out of range, or there is no text to predict.
    """
    if not 1 <= order <= _MAX_ORDER:
        raise InputError(f"evaluation.ngram_order must lie in 1 to {_MAX_ORDER}, got {order}")
    train, _ = _symbols(train_texts, order)
    validation, num_bytes = _symbols(validation_texts, order)
    if not num_bytes:
        raise InputError("evaluation.ngram_order: the validation split has no text")
    probabilities = _probabilities(train, validation, order)
    return float(-np.log2(probabilities).sum() / num_bytes)


def _symbols(texts: Iterable[bytes], order: int) -> tuple[np.ndarray, int]:
    """Returns all documents as one string of symbols, uint16 [S], and their number of bytes.

    Each document stands between `order - 1` boundaries and one.
    """
    opening = np.full(order - 1, _BOUNDARY, np.uint16)
    closing = np.full(1, _BOUNDARY, np.uint16)
    pieces = []
    num_bytes = 0
    for text in texts:
        pieces += [opening, np.frombuffer(text, np.uint8).astype(np.uint16), closing]
        num_bytes += len(text)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16), num_bytes


def _probabilities(train: np.ndarray, validation: np.ndarray, order: int) -> np.ndarray:
    """Returns P of every symbol of `validation` that is predicted, float64."""
    train_predicted = _predicted(train, order)
    validation_predicted = _predicted(validation, order)
    probabilities = np.full(np.count_nonzero(validation_predicted), 1.0 / _SYMBOLS)
    for n in range(1, order + 1):
        counts = _count(_grams(train, n)[train_predicted])
        grams = _grams(validation, n)[validation_predicted]
        gram_counts = _look_up(counts.grams, counts.gram_counts, grams)
        totals = _look_up(counts.histories, counts.totals, grams >> _BITS)
        distinct = _look_up(counts.histories, counts.distinct, grams >> _BITS)
        seen = totals > 0  # An unseen history says nothing, and leaves the shorter one's answer.
        probabilities[seen] = (gram_counts[seen] + distinct[seen] * probabilities[seen]) / (
            totals[seen] + distinct[seen]
        )
    return probabilities


def _predicted(symbols: np.ndarray, order: int) -> np.ndarray:
    """Returns which symbols are predicted, bool [S]: all but the opening boundaries."""
    predicted = np.ones(len(symbols), bool)
    closing = np.flatnonzero(symbols == _BOUNDARY)[order - 1 :: order]
    starts = np.concatenate([[0], closing[:-1] + 1]) if len(closing) else np.zeros(0, np.int64)
    for offset in range(order - 1):
        predicted[starts + offset] = False
    return predicted


def _grams(symbols: np.ndarray, n: int) -> np.ndarray:
    """Returns each symbol with the n - 1 before it, the last in the lowest bits: uint64 [S].

    The first n - 1 lack part of their history; they are opening boundaries, never predicted.
    """
    packed = symbols.astype(np.uint64)
    for distance in range(1, n):
        packed[distance:] |= symbols[:-distance].astype(np.uint64) << np.uint64(_BITS * distance)
    return packed


def _count(grams: np.ndarray) -> _Counts:
    unique, gram_counts = np.unique(grams, return_counts=True)
    # Sorted grams have those of one history next to each other.
    histories, starts, distinct = np.unique(unique >> _BITS, return_index=True, return_counts=True)
    totals = np.add.reduceat(gram_counts, starts) if len(starts) else gram_counts
    return _Counts(unique, gram_counts, histories, totals, distinct)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the values of the wanted keys, and 0 for those that are not there."""
    if not len(keys):
        return np.zeros(len(wanted), values.dtype)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
