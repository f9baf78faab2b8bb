"""Stored scores: values aligned with the positions of every document of a corpus.

A folder of scores holds one ArrayRecord file for each corpus, with one record for each document at
the document's index, and `scores.json`, which says what they are scores of. A record is 16 bytes
that tell the document (its name and text) from any other, then one array for each name, after each
other: float32 [positions], or what `fields` in scores.json says of the name.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from lm import strict_json
from lm.data.documents import Corpus, Document
from lm.data.hashing import fingerprint
from lm.errors import InputError

HEADER = "scores.json"

# Of scores.json; 2 has `fields`, and 1 has float32 [positions] alone.
FORMAT = 2

DTYPES = ("float32", "int32")

# More values at a position than this are no entries of a vocabulary.
_MOST_VALUES = 2**24

_DIGEST_BYTES = 16


class Field(NamedTuple):
    """What a name has at every position: `width` values of a type, or one (0), without an axis."""

    dtype: str = "float32"
    width: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values of one position."""
        return (self.width,) if self.width else ()

    @property
    def bytes(self) -> int:
        """Of the values of one position."""
        return np.dtype(self.dtype).itemsize * (self.width or 1)


class Part(NamedTuple):
    """The scores of one corpus: its name and fingerprint, its number of documents, and the file."""

    corpus: str
    fingerprint: str
    documents: int
    file: str


class Scores(NamedTuple):
    """A folder of scores.

    Attributes:
      folder: where it is.
      names: what the values are, in the order in which a record holds them.
      tokenizer: fingerprint of the tokenizer whose positions they are aligned with.
      parts: one a corpus.
      origin: what made them: free entries, for people to read.
      fields: one a name.
    """

    folder: Path
    names: tuple[str, ...]
    tokenizer: str
    parts: tuple[Part, ...]
    origin: dict[str, Any]
    fields: tuple[Field, ...]


def write(
    folder: str | Path,
    corpora: Sequence[Corpus],
    tokenizer: str,
    names: Sequence[str],
    values: Iterable[np.ndarray | Sequence[np.ndarray]],
    origin: dict[str, Any],
    fields: Mapping[str, Field] | None = None,
) -> None:
    """Writes a folder of scores, under another name until it is whole.

    A process that is killed leaves a hidden folder `.NAME.unfinished-*` beside it, which nothing
    reads.

    Args:
      folder: the folder to make.
      corpora: what is scored.
      tokenizer: its fingerprint.
      names: of the references that the values are.
      values: for every document of every corpus, in order, an array [names, positions] or, of one
        name, [positions], with the positions of `lm.data.layout.encode_document`; NaN where there
        is no value. With `fields`, a tuple of arrays [positions, ...], one a name.
      origin: what made them; JSON.
      fields: of the names that are not one float32 a position.

    Raises:
      InputError: see `check_new`.
      ValueError: fewer values than documents.
    """
    folder, fields = check_new(folder), fields or {}
    of_names = [fields.get(name, Field()) for name in names]
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
    try:
        values = iter(values)
        parts = []
        for number, corpus in enumerate(corpora):
            part = Part(
                corpus.name,
                corpus.fingerprint,
                len(corpus.documents),
                f"{number}.array_record",
            )
            _write_part(unfinished / part.file, corpus, values, of_names)
            parts.append(part._asdict())
        header = {"format": FORMAT, "names": list(names), "tokenizer": tokenizer, "parts": parts}
        header |= {"fields": {n: one._asdict() for n, one in fields.items()}, "origin": origin}
        (unfinished / HEADER).write_text(strict_json.dumps(header, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp's folders are for their owner alone.
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_part(file: Path, corpus: Corpus, values: Iterator[Any], fields: Sequence[Field]) -> None:
    # Groups of one record: random access reads no more than the document. Uncompressed: the low
    # bits of floats are noise.
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    try:
        for index in range(len(corpus.documents)):
            array = next(values, None)
            if array is None:
                raise ValueError("there are fewer values than documents")
            writer.write(_digest(corpus.documents[index]) + _content(array, fields))
    finally:
        writer.close()


def _content(values: np.ndarray | Sequence[np.ndarray], fields: Sequence[Field]) -> bytes:
    if not isinstance(values, tuple):
        values = np.reshape(values, (len(fields), -1))
    for one, field in zip(values, fields, strict=True):
        if one.shape != (len(values[0]), *field.shape):
            raise ValueError(f"values are {one.shape}, not [positions] of {field}")
    pairs = zip(values, fields, strict=True)
    return b"".join(np.ascontiguousarray(one, field.dtype).tobytes() for one, field in pairs)


def check_new(folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
      InputError: it is there already, or is not local.
    """
    if "://" in str(folder):
        raise InputError(f"{folder} is not a local folder, which a folder of scores must be")
    path = Path(folder).expanduser()
    if path.exists():
        raise InputError(f"{folder} is there already; give the name of a new folder")
    return path


def is_scores(folder: str | Path) -> bool:
    """Whether a folder holds scores."""
    return (Path(folder).expanduser() / HEADER).is_file()


def load(folder: str | Path) -> Scores:
    """Reads what a folder says of its scores; the values stay where they are.

    Raises:
      InputError: it holds no scores, or they are damaged.
    """
    path = Path(folder).expanduser()
    try:
        header = strict_json.loads((path / HEADER).read_text())
        parts = tuple(Part(**part) for part in header["parts"])
        names = tuple(header["names"])
        fields = _fields(names, header)
        scores = Scores(path, names, header["tokenizer"], parts, dict(header["origin"]), fields)
        counts = [_open(path / part.file).num_records() for part in parts]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} holds no scores that can be read: {reason}") from None
    if counts != [part.documents for part in parts]:
        raise InputError(f"{folder} is damaged: {HEADER} and its files differ in their documents")
    return scores


def stored(scores: Scores, name: str, corpora: Sequence[Corpus], tokenizer: str) -> list["Stored"]:
    """The scores of the given corpora under one name, one `Stored` a corpus.

    Raises:
      InputError: the folder holds other scores, or those of another tokenizer or corpus.
    """
    where = f"scores in {scores.folder}"
    if name not in scores.names:
        raise InputError(f"{where} are {', '.join(scores.names)}, not {name}")
    if scores.tokenizer != tokenizer:
        raise InputError(
            f"{where} were made with the tokenizer {scores.tokenizer}, not {tokenizer}: run "
            "launch.score on a run with this tokenizer"
        )
    by_content = {part.fingerprint: part for part in scores.parts}
    found = []
    for corpus in corpora:
        part = by_content.get(corpus.fingerprint)
        if part is None or part.documents != len(corpus.documents):
            others = ", ".join(part.corpus for part in scores.parts)
            raise InputError(
                f"{where} are not those of the training documents of data.corpus {corpus.name!r} "
                f"as they are now, but of {others}: run launch.score again"
            )
        row = scores.names.index(name)
        found.append(Stored(str(scores.folder / part.file), row, scores.fields))
    return found


class Stored:
    """The scores of one corpus under one name; every process that reads them opens them itself."""

    def __init__(self, file: str, row: int, fields: tuple[Field, ...]):
        self._file = file
        self._row = row
        self._fields = fields
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def read(self, index: int, document: Document, length: int) -> np.ndarray:
        """The values of a document's `length` positions, [length, ...] of the name's field.

        Raises:
          InputError: there are none, or they are those of other text or of another length.
        """
        where = f"scores in {self._file} of document {index} ({document.name})"
        try:
            if self._reader is None:
                self._reader = _open(self._file)
            (record,) = self._reader.read([index])
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{where} cannot be read: {reason}") from None
        if record[:_DIGEST_BYTES] != _digest(document):
            raise InputError(f"{where} are those of other text: run launch.score again")
        # Before memory is taken for as many values as the header speaks of.
        size = sum(field.bytes for field in self._fields)
        if len(record) != _DIGEST_BYTES + size * length:
            raise InputError(
                f"{where} are {(len(record) - _DIGEST_BYTES) / size:g}, but it has {length} "
                "positions: run launch.score again"
            )
        before = sum(field.bytes for field in self._fields[: self._row])
        field = self._fields[self._row]
        values = np.frombuffer(
            record,
            field.dtype,
            count=length * (field.width or 1),
            offset=_DIGEST_BYTES + before * length,
        )
        return values.reshape(length, *field.shape)


def _fields(names: tuple[str, ...], header: Mapping[str, Any]) -> tuple[Field, ...]:
    """The fields of the names, from a header of any format.

    Raises:
      ValueError, TypeError: the header is of a newer format, or a field is none.
    """
    if not 1 <= header.get("format", 1) <= FORMAT:
        raise ValueError(f"format {header['format']} is newer than {FORMAT}, the one that is known")
    fields = {name: Field(**one) for name, one in dict(header.get("fields", {})).items()}
    for name, (dtype, width) in fields.items():
        whole = isinstance(width, int) and 0 <= width <= _MOST_VALUES
        if name not in names or dtype not in DTYPES or not whole:
            raise ValueError(f"{name} cannot have {width!r} values of type {dtype!r}")
    return tuple(fields.get(name, Field()) for name in names)


def _open(file: str | Path) -> Any:
    """A reader tuned for random access."""
    return array_record_module.ArrayRecordReader(
        str(file), "readahead_buffer_size:0,max_parallelism:0"
    )


def _digest(document: Document) -> bytes:
    parts = [document.name]
    for answer in document.answers:
        parts += [answer.text, *answer.roles]
    return bytes.fromhex(fingerprint(part.encode(errors="surrogatepass") for part in parts))
