"""Stored scores: float32 values aligned with the positions of every document of a corpus.

A folder of scores holds one ArrayRecord file for each corpus, with one record for each document at
the document's index, and `scores.json`, which says what they are scores of. A record is 16 bytes
that tell the document (its name and text) from any other, then float32 [names, positions].
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from lm import strict_json
from lm.data.documents import Corpus, Document
from lm.data.hashing import fingerprint
from lm.errors import InputError

HEADER = "scores.json"

_DIGEST_BYTES = 16


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
    """

    folder: Path
    names: tuple[str, ...]
    tokenizer: str
    parts: tuple[Part, ...]
    origin: dict[str, Any]


def write(
    folder: str | Path,
    corpora: Sequence[Corpus],
    tokenizer: str,
    names: Sequence[str],
    values: Iterable[np.ndarray],
    origin: dict[str, Any],
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
        is no value.
      origin: what made them; JSON.

    Raises:
      InputError: see `check_new`.
      ValueError: fewer values than documents.
    """
    folder = check_new(folder)
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
            # Groups of one record: random access reads no more than the document. Uncompressed:
            # the low bits of floats are noise.
            writer = array_record_module.ArrayRecordWriter(
                str(unfinished / part.file), "group_size:1,uncompressed"
            )
            try:
                for index in range(part.documents):
                    array = next(values, None)
                    if array is None:
                        raise ValueError("there are fewer values than documents")
                    content = np.ascontiguousarray(array, np.float32).tobytes()
                    writer.write(_digest(corpus.documents[index]) + content)
            finally:
                writer.close()
            parts.append(part._asdict())
        header = {"names": list(names), "tokenizer": tokenizer, "parts": parts, "origin": origin}
        (unfinished / HEADER).write_text(strict_json.dumps(header, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp's folders are for their owner alone.
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


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
        scores = Scores(
            path, tuple(header["names"]), header["tokenizer"], parts, dict(header["origin"])
        )
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
        row, rows = scores.names.index(name), len(scores.names)
        found.append(Stored(str(scores.folder / part.file), row, rows))
    return found


class Stored:
    """The scores of one corpus under one name; every process that reads them opens them itself."""

    def __init__(self, file: str, row: int, rows: int):
        self._file = file
        self._row = row
        self._rows = rows
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def read(self, index: int, document: Document, length: int) -> np.ndarray:
        """The values of a document's `length` positions, float32 [length].

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
        values = np.frombuffer(record, np.float32, offset=_DIGEST_BYTES)
        if len(values) != self._rows * length:
            raise InputError(
                f"{where} are {len(values) // self._rows}, but it has {length} positions: run "
                "launch.score again"
            )
        return values.reshape(self._rows, length)[self._row]


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
