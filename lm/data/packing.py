"""Packing of documents into rows of one length.

`concat` fills every row to its end and cuts documents there; `best_fit` keeps documents whole
where they fit in a row, and pads.
"""

from typing import Any

import grain
import numpy as np

from lm.data.layout import make_row

# Rows that best-fit packing fills at the same time: more waste less, and take longer to search.
_OPEN_ROWS = 128

_FIELD = "document"


def pack(documents: grain.IterDataset, packing: str, length: int) -> grain.IterDataset:
    """Returns rows, as `lm.data.layout.make_row` makes them, of documents of `POSITION`s.

    Every position of every document is in exactly one row. A document that is cut goes on as a
    new segment, with positions from 0.

    Args:
      documents: arrays of `POSITION`.
      packing: `concat` or `best_fit`.
      length: positions in a row, T.
    """
    if packing == "concat":
        return _ConcatThenSplit(documents, length)
    pieces = grain.experimental.FlatMapIterDataset(documents, _Cut(length))
    packed = grain.experimental.BestFitPackIterDataset(
        pieces, length_struct={_FIELD: length}, num_packing_bins=_OPEN_ROWS, shuffle_bins=False
    )
    return packed.map(_split_segments)


class _ConcatThenSplit(grain.IterDataset):
    """Rows cut from the stream of all documents.

    Grain's own ConcatThenSplit (0.2.18) does not restore its stream from a state that has been
    through JSON, as it is in a checkpoint: its mark for "nothing left over" is a tuple, which
    comes back as a list and is not recognised. This state is the parent's and a number.
    """

    def __init__(self, parent: grain.IterDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatThenSplitIterator(iter(self._parent), self._length)


class _ConcatThenSplitIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._document = ()
        self._offset = 0  # Positions of the document that are in rows already.
        self._before = parent.get_state()  # From which the parent gives the document again.

    def __next__(self) -> dict[str, np.ndarray]:
        pieces = []
        room = self._length
        while room:
            if self._offset == len(self._document):
                before = self._parent.get_state()
                try:
                    self._document = next(self._parent)
                except StopIteration:
                    if pieces:
                        break
                    raise
                self._before, self._offset = before, 0
            piece = self._document[self._offset : self._offset + room]
            pieces.append(piece)
            self._offset += len(piece)
            room -= len(piece)
        return make_row(pieces, self._length)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before = state["parent"]
        self._offset = state["offset"]
        self._document = next(self._parent) if self._offset else ()


class _Cut(grain.experimental.FlatMapTransform):
    """Cuts a document into pieces of at most `length` positions."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, document: np.ndarray) -> list[dict[str, np.ndarray]]:
        starts = range(0, len(document), self._length)
        return [{_FIELD: document[start : start + self._length]} for start in starts]


def _split_segments(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    row, segment_ids = packed[_FIELD], packed[f"{_FIELD}_segment_ids"]
    starts = np.flatnonzero(np.diff(segment_ids)) + 1
    pieces = np.split(row, starts)
    if segment_ids[-1] == 0:
        pieces.pop()  # The padding.
    return make_row(pieces, len(row))
