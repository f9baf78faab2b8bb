"""Preference data as rows: pairs of a chosen and a rejected answer, and labelled answers.

The answers of a record, each a segment with its own prompt, lie one after the other in one row, so
that no micro-batch and no device ever has one without the other. A row has, besides the arrays of
every batch, int32 [T] arrays:

  pair_ids        the number of the pair in its row, from 0; -1 in the padding. Of answers that an
                  objective reads one by one, each has a number.
  sides           1 at a chosen or desirable answer and its prompt, -1 at a rejected or undesirable
                  one, 0 elsewhere.
  mismatched_ids  only where asked for: the number in its row, from 0, of an answer that was put
                  under the prompt of another record; -1 elsewhere. There pair_ids are -1 and sides
                  0.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from lm.data.documents import Corpus, Document
from lm.data.layout import add_fields, encode_document, make_row
from lm.data.packing import pack_whole
from lm.data.preferences import prompt_of, with_answer_of
from lm.data.scores import Stored
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError

PAIRED = ("pair_ids", "sides")
MISMATCHED = "mismatched_ids"
KEYS = (*PAIRED, MISMATCHED)

# Records after one that are looked at for an answer to another prompt.
_MOST_LOOKED_AT = 64

# The number of an answer in its record: a field of positions until they lie in a row.
_ANSWER = "answer"


class Reading(NamedTuple):
    """How an objective reads preference data.

    Attributes:
      user: who reads, as "objective.name='dpo'".
      unpaired: answers one by one, so that labelled ones are read as well.
      mismatched: with each answer, that of the next record that has another prompt.
    """

    user: str
    unpaired: bool = False
    mismatched: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays that a batch has besides those of every batch."""
        return KEYS if self.mismatched else PAIRED


class Usable(NamedTuple):
    """The records of a split that an objective is trained on.

    Attributes:
      kept: of each corpus the indices of its usable records.
      dropped: reason -> number of records that are left out for it.
      positions: in all kept records.
    """

    kept: tuple[np.ndarray, ...]
    dropped: Mapping[str, int]
    positions: int

    def describe(self) -> str:
        """One line, "" where nothing is left out."""
        if not self.dropped:
            return ""
        count = sum(map(len, self.kept)) + sum(self.dropped.values())
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
        return f"left out {sum(self.dropped.values()):,} of {count:,} preference records: {reasons}"


def check_kinds(corpora: Sequence[Corpus], reading: Reading | None) -> None:
    """Refuses corpora whose records cannot be read so; without `reading` as ordinary text.

    Raises:
      InputError: names the corpus, and what would be valid.
    """
    for corpus in corpora:
        if reading is None:
            if corpus.kind == "labelled":
                raise InputError(
                    f"data.corpus {corpus.name!r} has labelled answers, good and bad ones: it is "
                    "for an objective that reads sides (python -m launch.plan --methods)"
                )
        elif corpus.kind != "pairs" and not (reading.unpaired and corpus.kind == "labelled"):
            labelled = ", or prompt, completion and label" if reading.unpaired else ""
            raise InputError(
                f"data.corpus {corpus.name!r} has records of the kind {corpus.kind}, but "
                f"{reading.user} needs prompt, chosen and rejected{labelled}"
            )


def usable(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, reading: Reading, length: int
) -> Usable:
    """Encodes all records once, to say which can be trained on.

    Raises:
      InputError: none can.
    """
    kept, dropped, positions = [], Counter(), 0
    for corpus in corpora:
        indices = []
        for index in range(len(corpus.documents)):
            record, reason = encode_record(corpus.documents, index, tokenizer, reading, length)
            if record is None:
                dropped[reason] += 1
            else:
                indices.append(index)
                positions += len(record)
        kept.append(np.array(indices, np.int64))
    found = Usable(tuple(kept), dict(sorted(dropped.items())), positions)
    for corpus, indices in zip(corpora, kept, strict=True):
        if not len(indices):
            raise InputError(
                f"data.corpus {corpus.name!r}: no record can be trained on with "
                f"data.sequence_length={length}; {found.describe()}"
            )
    return found


def encode_record(
    documents: Sequence[Document], index: int, tokenizer: Tokenizer, reading: Reading, length: int
) -> tuple[np.ndarray | None, str]:
    """The answers of a record as positions one after the other, or None and why not.

    Returns:
      An array of `POSITION` with further fields: those of `Reading.keys` as in a row of this record
      alone, and the number of the answer.

    Raises:
      InputError: an answer cannot be encoded.
    """
    document = documents[index]
    if any(not any(text for text, weight in one.spans if weight) for one in document.answers):
        return None, "with an empty answer"
    encoded = [encode_document(one, tokenizer) for one in document.answers]
    targets = [one["targets"][one["weights"] != 0] for one in encoded]
    if len(targets) == 2 and np.array_equal(*targets):
        return None, "with two equal answers"
    sides = (1, -1) if document.label is None else (1 if document.label else -1,)
    pair = range(len(encoded)) if reading.unpaired else (0,) * len(encoded)
    fields = [{"pair_ids": pair[i], "sides": sides[i], MISMATCHED: -1} for i in range(len(encoded))]
    if reading.mismatched:
        others = list(_mismatched(documents, index))
        if len(others) < len(encoded):
            return None, "without a later record that has another prompt"
        encoded += [encode_document(one, tokenizer) for one in others]
        fields += [{"pair_ids": -1, "sides": 0, MISMATCHED: i} for i in range(len(others))]
    if sum(map(len, encoded)) > length:
        return None, "longer than data.sequence_length"
    return np.concatenate(
        [
            add_fields(
                one,
                **{name: np.int32(its[name]) for name in reading.keys},
                **{_ANSWER: np.int32(number)},
            )
            for number, (one, its) in enumerate(zip(encoded, fields, strict=True))
        ]
    ), ""


def _mismatched(documents: Sequence[Document], index: int) -> Iterator[Document]:
    """The prompt of a record with the answers of the next one whose prompt is another.

    The last record is followed by the first. Of a pair both answers get one.
    """
    document, count = documents[index], len(documents)
    for step in range(1, min(count, _MOST_LOOKED_AT + 1)):
        other = documents[(index + step) % count]
        if prompt_of(other) == prompt_of(document):
            continue
        found = [with_answer_of(document, answer) for answer in other.answers]
        if len(found) >= len(document.answers) and None not in found:
            yield from found[: len(document.answers)]
            return


class Encoder:
    """(index, document) -> positions of the record, with its id and stored scores; None where it
    cannot be used.

    Args:
      documents: of a corpus.
      tokenizer: turns text into ids.
      reading: how they are read.
      length: T.
      first: the id of the first document.
      stored: name of a reference -> its scores of this corpus.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        reading: Reading,
        length: int,
        first: int,
        stored: Mapping[str, Stored],
    ):
        self._documents, self._tokenizer, self._reading = documents, tokenizer, reading
        self._length, self._first, self._stored = length, first, stored

    def __call__(self, numbered: tuple[int, Document]) -> np.ndarray | None:
        index, document = numbered
        positions, _ = encode_record(
            self._documents, index, self._tokenizer, self._reading, self._length
        )
        if positions is None:
            return None
        values = {
            name: one.read(index, document, len(positions)) for name, one in self._stored.items()
        }
        places = np.arange(len(positions), dtype=np.int32)
        sample = np.int32(self._first + index)
        return add_fields(positions, sample_ids=sample, sample_positions=places, **values)


def pack_records(records: grain.IterDataset, length: int) -> grain.IterDataset:
    """Returns rows of whole records, their answers apart and their pairs numbered.

    Args:
      records: each of `Encoder`, at most `length` positions.
      length: T.
    """
    return pack_whole(records, length, row_of_records)


def row_of_records(records: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns one row of records, each of `encode_record` or `Encoder`; see `make_row`."""
    answers = []
    # How many numbers the records before have taken.
    taken = dict.fromkeys(("pair_ids", MISMATCHED), 0)
    for record in records:
        record = record.copy()
        for name in taken.keys() & set(record.dtype.names):
            numbers = record[name]
            highest = numbers.max()
            numbers[numbers >= 0] += taken[name]
            taken[name] += highest + 1
        answers += np.split(record, np.flatnonzero(np.diff(record[_ANSWER])) + 1)
    row = make_row(answers, length)
    del row[_ANSWER]
    return row
