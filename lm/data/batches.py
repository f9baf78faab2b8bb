"""Batches of packed rows, as Grain pipelines; their state is saved with a checkpoint.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions, num_bytes, sample_ids
and sample_positions are int32, weights is float32 (0 is not a target). `lm.data.layout` says how a
document becomes a row. `sample_ids` holds the index of the document that a position comes from,
counted through all corpora of the split in their order, and -1 in the padding: the same number for
the same document in every epoch, process, packing, mixture and resumed run. `sample_positions`
counts the positions of a document from 0, through all rows that it was cut into. Stored scores of
the documents' positions join the batch by their names, float32 [B, T] or of the type and width that
they are stored with. For an objective that reads preference data `lm.data.pairs` says what a row
has besides.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lm.data import cuts
from lm.data.documents import Corpus, Document
from lm.data.joined_streams import Joined
from lm.data.layout import PADDING, add_fields, encode_document, encode_pieces
from lm.data.packing import pack
from lm.data.pairs import Encoder, Reading, Usable, check_kinds, pack_records, usable
from lm.data.scores import Stored
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError

# One thread prepares whole batches ahead. More, that read documents ahead of it, only contend with
# it for the interpreter: measured, the fewer the faster. `workers` is what scales.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

# Batches that wait for the step: enough for the time that it takes to fill a window of rows.
_WAITING = 8


def train_batches(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    packing: str,
    seed: int,
    mixture_weights: Sequence[float] = (),
    shuffle_rows: int,
    scores: Mapping[str, Sequence[Stored]] | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    streams: int = 0,
    reading: Reading | None = None,
    found: Usable | None = None,
) -> grain.IterDataset:
    """Returns an endless dataset of this process's rows of every training batch.

    A batch is put together from streams. Each of them reads its own share of each corpus, in an
    order that is drawn anew each epoch, and each process has its own streams. With the same number
    of streams, batches of all processes together are the same for any number of processes.
    One document may fill many rows in a row, so rows are shuffled once more after packing. The
    order depends on every argument but `workers` being 0 or 1; the state of an iterator, which is
    JSON, restores exactly the rest of its stream.

    Args:
      corpora: the training split.
      tokenizer: turns text into ids.
      batch_size: B, over all processes.
      sequence_length: T.
      packing: `concat` or `best_fit`.
      seed: of all orders.
      mixture_weights: for each corpus, how often its next document is taken; () is as often as it
        has documents, with which all corpora are read through at the same time.
      shuffle_rows: rows of one shuffle window; 1 is no shuffle.
      scores: name of a reference -> its stored scores, one `Stored` a corpus.
      workers: processes that prepare batches; with 0 a thread does. Grain's workers need absl's
        flags to be parsed, as they are in an absl program.
      process_index: which of the processes that train together this one is.
      process_count: how many there are.
      streams: how many streams there are; 0 is one a process. With more than one, the state of an
        iterator is {"streams": {number: state}}, with all those of this process.
      reading: how preference data is read; None reads documents, of a pair the chosen answer.
      found: the usable records, where somebody has looked for them already.

    Returns:
      A Grain dataset of batches with B / process_count rows; with `workers`, close its iterators.

    Raises:
      InputError: an argument is impossible, or the corpora are too small (see `check_enough`).
        Iterators raise it for a document that cannot be encoded, or does not fit its scores.
    """
    _check(batch_size, sequence_length, packing, process_count)
    _check_order(shuffle_rows, workers, seed)
    check_kinds(corpora, reading)
    if reading and found is None:
        found = usable(corpora, tokenizer, reading, sequence_length)
    sizes = [len(corpus.documents) for corpus in corpora]
    if found:
        sizes = [len(kept) for kept in found.kept]
    weights = _weights(sizes, mixture_weights)
    streams = streams or process_count
    _check_streams(corpora, sizes, streams, process_count, batch_size)
    if found:
        _refuse_fewer(found.positions, batch_size, sequence_length)
    else:
        check_enough(corpora, tokenizer, batch_size=batch_size, sequence_length=sequence_length)

    numbered = list(_numbered(corpora, tokenizer, scores or {}, reading, sequence_length, found))

    def stream(number: int) -> grain.IterDataset:
        parts = [
            documents.slice(slice(number, None, streams))
            .shuffle(seed=_derive_seed(seed, number, corpus))
            .repeat()
            .map(encode)
            for corpus, (documents, encode) in enumerate(numbered)
        ]
        # Mixed before to_iter_dataset: a mixture of iterators has the threads of each of them.
        documents = grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
        rows = _rows(documents, packing, sequence_length, reading)
        rows = _shuffled(rows, shuffle_rows, _derive_seed(seed, number, len(corpora)))
        return _in_workers(rows.batch(batch_size // streams, drop_remainder=True), workers)

    own = streams // process_count
    numbers = range(process_index * own, (process_index + 1) * own)
    batches = stream(0) if streams == 1 else Joined({i: stream(i) for i in numbers})
    if workers:
        return batches
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_WAITING)


def _rows(
    documents: grain.MapDataset, packing: str, length: int, reading: Reading | None
) -> grain.IterDataset:
    read = documents.to_iter_dataset(_READ)
    return pack_records(read, length) if reading else pack(read, packing, length)


def _shuffled(rows: grain.IterDataset, window: int, seed: int) -> grain.IterDataset:
    """The rows in another order inside of each window of `window` rows."""
    if window == 1:
        return rows
    return grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=seed)


def _in_workers(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The batches as `workers` processes prepare them ahead; as they are with 0."""
    if not workers:
        return batches
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_WAITING)
    return batches.mp_prefetch(options)


def _check_order(shuffle_rows: int, workers: int, seed: int) -> None:
    if shuffle_rows < 1:
        raise InputError(f"data.shuffle_rows must be at least 1, got {shuffle_rows}")
    if workers < 0:
        raise InputError(f"data.workers must be at least 0, got {workers}")
    if seed < 0:
        raise InputError(f"train.seed must be at least 0, got {seed}")


def _weights(sizes: Sequence[int], mixture_weights: Sequence[float]) -> list[float]:
    weights = list(mixture_weights) or list(sizes)
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise InputError(
            f"data.mixture_weights must be {len(sizes)} positive numbers, one a corpus, or (),"
            f" got {tuple(weights)}"
        )
    return weights


def _check_streams(
    corpora: Sequence[Corpus],
    sizes: Sequence[int],
    streams: int,
    process_count: int,
    batch_size: int,
) -> None:
    if streams < 0 or streams % process_count or batch_size % streams:
        raise InputError(
            f"data.streams must be a multiple of the {process_count} processes and divide"
            f" train.batch_size {batch_size}, got {streams}"
        )
    for corpus, size in zip(corpora, sizes, strict=True):
        if size < streams:
            raise InputError(
                f"data.corpus {corpus.name!r}: its {size} training documents"
                f" cannot be shared among {streams} processes or streams; use fewer"
            )


def evaluation_batches(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    packing: str = "concat",
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading | None = None,
) -> grain.IterDataset:
    """Returns a finite dataset of this process's rows of every evaluation batch.

    Every target is in exactly one row, in the order of the corpora, but for those of preference
    data that cannot be trained on. Every process packs all rows
    and keeps its own, so that the batches of all processes together are the same for any number of
    processes, and each yields the same number of them. The last batch is filled up with rows of
    padding.

    Args:
      corpora: the split to evaluate.
      tokenizer: turns text into ids.
      batch_size: B, over all processes.
      sequence_length: T.
      packing: `concat` or `best_fit`.
      process_index: which of the processes that evaluate together this one is.
      process_count: how many there are.
      reading: as for `train_batches`.

    Returns:
      A Grain dataset of batches with B / process_count rows.

    Raises:
      InputError: an argument is impossible.
    """
    _check(batch_size, sequence_length, packing, process_count)
    check_kinds(corpora, reading)
    numbered = _numbered(corpora, tokenizer, {}, reading, sequence_length)
    documents = grain.MapDataset.concatenate([part.map(encode) for part, encode in numbered])
    rows = _rows(documents, packing, sequence_length, reading)
    batches = rows.batch(batch_size, drop_remainder=False).map(
        functools.partial(_own_rows, batch_size, process_index, process_count)
    )
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


def check_enough(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, *, batch_size: int, sequence_length: int
) -> None:
    """Refuses corpora that do not fill one batch of B rows of T targets without repetition.

    Reads only as many documents as it takes.

    Raises:
      InputError: there are fewer targets.
    """
    needed = batch_size * sequence_length
    found = 0
    for corpus in corpora:
        for index in range(len(corpus.documents)):
            for positions in encode_pieces(corpus.documents[index], tokenizer):
                found += len(positions)
                if found >= needed:
                    return
    _refuse_fewer(found, batch_size, sequence_length)


def _refuse_fewer(found: int, batch_size: int, sequence_length: int) -> None:
    """Raises InputError for fewer positions than one batch has."""
    needed = batch_size * sequence_length
    if found < needed:
        raise InputError(
            f"data.corpus: the training split has {found:,} tokens, fewer than one batch of"
            f" train.batch_size {batch_size} x data.sequence_length {sequence_length} ="
            f" {needed:,}; use more text or a smaller batch"
        )


def _check(batch_size: int, sequence_length: int, packing: str, process_count: int) -> None:
    if sequence_length < 1:
        raise InputError(f"data.sequence_length must be at least 1, got {sequence_length}")
    if packing not in ("concat", "best_fit"):
        raise InputError(f"data.packing must be concat or best_fit, got {packing!r}")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"train.batch_size must be a multiple of the {process_count} processes, got"
            f" {batch_size}"
        )


class _Numbered(Sequence):
    """Pairs of an index in the corpus and the document there: of all documents, or some."""

    def __init__(self, documents: Sequence[Document], kept: np.ndarray | None = None):
        self._documents, self._kept = documents, kept

    def __len__(self) -> int:
        return len(self._documents if self._kept is None else self._kept)

    def __getitem__(self, index: int) -> tuple[int, Document]:
        index = index if self._kept is None else int(self._kept[index])
        return index, self._documents[index]


def _numbered(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    scores: Mapping[str, Sequence[Stored]],
    reading: Reading | None,
    length: int,
    found: Usable | None = None,
) -> Iterator[tuple[grain.MapDataset, Callable[..., Any]]]:
    """Yields for each corpus its numbered documents, and what makes positions of one of them."""
    sizes = [len(corpus.documents) for corpus in corpora]
    for number, first in enumerate(itertools.accumulate(sizes[:-1], initial=0)):
        stored = {name: parts[number] for name, parts in scores.items()}
        documents = corpora[number].documents
        if reading:
            encode = Encoder(documents, tokenizer, reading, length, first, stored)
        else:
            encode = functools.partial(_encode, tokenizer=tokenizer, first=first, stored=stored)
        kept = found.kept[number] if found else None
        yield grain.MapDataset.source(_Numbered(documents, kept)), encode


def _encode(
    numbered: tuple[int, Document], tokenizer: Tokenizer, first: int, stored: dict[str, Stored]
) -> np.ndarray | Iterator[np.ndarray]:
    """Returns a document's positions with its id, `first` + its index, and its stored scores.

    Those of a long document without scores come in pieces, made when they are asked for.
    """
    index, document = numbered
    sample = np.int32(first + index)
    if not stored and sum(len(text) for text, _ in document.spans) > cuts.PIECE:
        return _encode_pieces(document, tokenizer, sample)
    positions = encode_document(document, tokenizer)
    # The scores of a pair are those of both answers.
    others = [len(encode_document(one, tokenizer)) for one in document.answers[1:] if stored]
    count = len(positions)
    values = {
        name: one.read(index, document, count + sum(others))[:count] for name, one in stored.items()
    }
    places = np.arange(len(positions), dtype=np.int32)
    return add_fields(positions, sample_ids=sample, sample_positions=places, **values)


def _encode_pieces(
    document: Document, tokenizer: Tokenizer, sample: np.int32
) -> Iterator[np.ndarray]:
    start = 0
    for positions in encode_pieces(document, tokenizer):
        places = np.arange(start, start + len(positions), dtype=np.int32)
        start += len(positions)
        yield add_fields(positions, sample_ids=sample, sample_positions=places)


def _derive_seed(*numbers: int) -> int:
    # Grain adds the epoch, or the window, to a seed: of neighbouring seeds one would repeat the
    # other's orders. 31 bits leave room for that sum, which must fit in 32.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _own_rows(
    batch_size: int, process_index: int, process_count: int, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns this process's rows of a batch, of which the last rows may be missing."""
    local = batch_size // process_count

    def own(name: str, x_BT: np.ndarray) -> np.ndarray:
        missing = ((0, batch_size - len(x_BT)), (0, 0))
        filled_BT = np.pad(x_BT, missing, constant_values=PADDING.get(name, 0))
        return filled_BT[process_index * local : (process_index + 1) * local]

    return {name: own(name, x_BT) for name, x_BT in batch.items()}
