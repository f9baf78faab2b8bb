"""A file of JSON lines as two corpora, train and validation, read by offset.

The file is parsed once in a process, when its first split is loaded, so that a bad line is found
before anything else starts. What is kept is the index: the line number, the offset and the length
of every document.
"""

import functools
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.documents import Corpus, Document, decode, span_fields
from lm.data.hashing import Fingerprint, held_out
from lm.errors import InputError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def load_lines(name: str, path: Path, split: str, validation_fraction: float, of: Path) -> Corpus:
    """Loads a file of JSON objects, one a line, split by a hash of the line.

    Args:
      name: of the corpus, as it was written in the config.
      path: of the JSON lines.
      split: `train` or `validation`.
      validation_fraction: the share of lines that is held out.
      of: the file that the lines were taken from, for messages and names of documents; `path` where
        they are the file itself.

    Raises:
      InputError: a line, of either split, is not an object with the strings `text`, or `prompt`
        and `response`; the message opens with the file and the line's number.
    """
    try:
        stat = path.stat()
        parts = _index(path, stat.st_size, stat.st_mtime_ns, validation_fraction, of)
    except OSError as error:
        raise InputError(f"cannot read {of}: {error.strerror}") from error
    part = parts[split == "validation"]
    documents = _Lines(path, of, part)
    return Corpus(name, documents, part.fingerprint, part.replaced, part.without_target)


class _Part(NamedTuple):
    """The index of one split: arrays int64 [documents], and counts of documents."""

    numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    replaced: int
    without_target: int


@functools.lru_cache(maxsize=16)
def _index(
    path: Path, size: int, modified: int, validation_fraction: float, of: Path
) -> tuple[_Part, _Part]:
    """The index of both splits; `size` and `modified` tell a file from what it was before."""
    places = [array("q"), array("q")]  # Number, offset and length of each line after each other.
    digests = [Fingerprint(), Fingerprint()]
    counts = np.zeros((2, 2), np.int64)
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.strip().removeprefix(_BYTE_ORDER_MARK).strip()
            if content:
                spans, bad = _parse(content, f"{of}:{number}")
                held = int(held_out(content, validation_fraction))
                places[held].extend((number, offset, len(line)))
                digests[held].update(content)
                counts[held] += bad, not any(text and weight for text, weight in spans)
            offset += len(line)
    return tuple(
        _Part(*np.array(where, np.int64).reshape(-1, 3).T, digest.hexdigest(), *map(int, count))
        for where, digest, count in zip(places, digests, counts, strict=True)
    )


class _Lines(Sequence):
    """The documents of one split, each found by its offset and length in bytes."""

    def __init__(self, path: Path, of: Path, part: _Part):
        self._path = path
        self._of = of
        self._numbers, self._offsets, self._lengths = part.numbers, part.offsets, part.lengths

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        number = int(self._numbers[index])  # Raises IndexError, which ends iteration.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.read(self._lengths[index])
        content = line.strip().removeprefix(_BYTE_ORDER_MARK)
        spans, _ = _parse(content, f"{self._of}:{number}")
        return Document(f"{self._of.name}:{number}", spans)


def _parse(line: bytes, where: str) -> tuple[tuple[tuple[str, float], ...], bool]:
    """Returns the spans of a line of JSON, and whether its text had to be repaired."""
    content, replaced = decode(line)
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a line of JSON: {error.msg}") from error
    except ValueError:  # The interpreter's limit of digits.
        raise InputError(f"{where}: not a line of JSON: an integer has too many digits") from None
    except RecursionError:
        raise InputError(f"{where}: not a line of JSON: brackets are nested too deeply") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(record).__name__}")
    spans = []
    for field, weight in span_fields(record, where):
        text = record[field]
        if not isinstance(text, str):
            raise InputError(f"{where}: {field} must be a string, got {type(text).__name__}")
        # JSON may escape half of a surrogate pair, which UTF-8 cannot hold.
        sound = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        replaced |= sound != text
        spans.append((sound, weight))
    return tuple(spans), replaced
