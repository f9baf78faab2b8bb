"""Packing of documents into rows of one length.

`concat` fills every row to its end and cuts documents there; `best_fit` keeps documents whole
where they fit in a row, and pads.
"""

import functools
from collections.abc import Callable, Iterable
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
      documents: each an array of `POSITION`, or an iterator over its pieces, which is read as far
        as rows are asked for.
      packing: `concat` or `best_fit`.
      length: positions in a row, T.
    """
    if packing == "concat":
        return _ConcatThenSplit(documents, length)
    return pack_whole(documents, length, make_row)


def pack_whole(
    documents: grain.IterDataset, length: int, make: Callable[..., dict[str, np.ndarray]]
) -> grain.IterDataset:
    """Returns the rows of `best_fit`, as `make` makes one of the documents in it and the length."""
    packed = grain.experimental.BestFitPackIterDataset(
        _Cut(documents, length),
        length_struct={_FIELD: length},
        num_packing_bins=_OPEN_ROWS,
        shuffle_bins=False,
    )
    return packed.map(functools.partial(_split_segments, make))


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
        self._document = _Cursor(())
        self._offset = 0  # Positions of the document that are in rows already.
        self._before = parent.get_state()  # From which the parent gives the document again.

    def __next__(self) -> dict[str, np.ndarray]:
        pieces = []
        room = self._length
        while room:
            piece = self._document.take(room)
            if not len(piece):
                before = self._parent.get_state()
                try:
                    self._document = _Cursor(next(self._parent))
                except StopIteration:
                    if pieces:
                        break
                    raise
                self._before, self._offset = before, 0
                continue
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
        self._document = _Cursor(next(self._parent) if self._offset else ())
        self._document.skip(self._offset)


class _Cut(grain.IterDataset):
    """Pieces of at most `length` positions, cut from documents as they are asked for.

    The state is that of Grain's own FlatMap, which makes all pieces of a document at once.
    """

    def __init__(self, parent: grain.IterDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _CutIterator(iter(self._parent), self._length)


class _CutIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._document = _Cursor(())
        self._index = 0  # Of the document's next piece.
        self._before = parent.get_state()

    def __next__(self) -> dict[str, np.ndarray]:
        while not len(piece := self._document.take(self._length)):
            before = self._parent.get_state()
            self._document = _Cursor(next(self._parent))
            self._before, self._index = before, 0
        self._index += 1
        return {_FIELD: piece}

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "next_index_in_buffer": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before = state["parent"]
        self._index = state["next_index_in_buffer"]
        self._document = _Cursor(next(self._parent) if self._index else ())
        self._document.skip(self._index * self._length)


class _Cursor:
    """Reads the positions of a document in order: one array, or an iterable of arrays."""

    def __init__(self, document: np.ndarray | Iterable[np.ndarray]):
        self._rest = iter((document,) if isinstance(document, np.ndarray) else document)
        self._piece = np.zeros(0)

    def take(self, count: int) -> np.ndarray:
        """Returns the next positions: `count` of them, or what is left."""
        while len(self._piece) < count and (more := next(self._rest, None)) is not None:
            self._piece = np.concatenate([self._piece, more]) if len(self._piece) else more
        taken, self._piece = self._piece[:count], self._piece[count:]
        return taken

    def skip(self, count: int) -> None:
        """Passes over `count` positions, without holding them."""
        while count > len(self._piece) and (more := next(self._rest, None)) is not None:
            count -= len(self._piece)
            self._piece = more
        self._piece = self._piece[count:]


def _split_segments(
    make: Callable[..., dict[str, np.ndarray]], packed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    row, segment_ids = packed[_FIELD], packed[f"{_FIELD}_segment_ids"]
    starts = np.flatnonzero(np.diff(segment_ids)) + 1
    pieces = np.split(row, starts)
    if segment_ids[-1] == 0:
        pieces.pop()  # The padding.
    return make(pieces, len(row))
