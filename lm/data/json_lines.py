"""Corpora of records: JSON lines, which are indexed once and read by offset.

A file is parsed when it is loaded, so that a bad line is found before anything else starts. What
stays in memory is the index, 25 bytes a record; both splits share it. Lines are parsed again, one
at a time, when their documents are asked for.
"""

import functools
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.chats import read_messages
from lm.data.documents import Corpus, Document, decode, span_fields
from lm.data.hashing import Fingerprint, held_out
from lm.data.preferences import is_preference, read_preference
from lm.data.problems import is_problem, key_of, read_problem
from lm.errors import InputError

# What a record may have instead of a text, for messages.
_OTHERS = (
    ", or messages, or prompt and answer, or prompt, chosen and rejected, or prompt, completion "
    "and label"
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# How a file begins that is no text in UTF-8, and what to call it.
_OTHER = {
    b"\x1f\x8b": "compressed; name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed; name it .zst",
    b"PAR1": "a parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; extract it",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}


class _Index(NamedTuple):
    """Of every record: its line, where it begins and ends in bytes, and its split; their kind."""

    numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray
    fingerprints: dict[str, str]
    replaced: dict[str, int]
    kind: str


def load_jsonl(
    name: str, path: Path, split: str, validation_fraction: float, original: Path | None = None
) -> Corpus:
    """Loads a file of JSON objects, one a line, split by a hash of the line.

    Problems are split by a hash of their prompt, so that no two with the same prompt are on
    different sides.

    Args:
      name: of the corpus, as it was written in the config.
      path: of the file.
      split: `train` or `validation`.
      validation_fraction: the share of lines that is held out.
      original: the file that `path` was converted from, which messages and documents name.

    Raises:
      InputError: a line, of either split, is not an object with the strings `text`, or `prompt`
        and `response`, or with the list `messages` of a chat, or one of `lm.data.problems` or
        `lm.data.preferences`, or is of another kind than the first; the message opens with the file
        and the line's number. Or the file is no text in UTF-8.
    """
    original = original or path
    try:
        stat = path.stat()
        index = _index(path, stat.st_size, stat.st_mtime_ns, validation_fraction, original)
    except OSError as error:
        raise InputError(f"cannot read {original}: {error.strerror}") from error
    chosen = np.flatnonzero(index.held_out == (split == "validation"))
    places = (index.numbers[chosen], index.offsets[chosen], index.lengths[chosen])
    lines = _Lines(path, original, *places)
    return Corpus(name, lines, index.fingerprints[split], index.replaced[split], index.kind)


@functools.lru_cache(maxsize=8)
def _index(
    path: Path, size: int, modified: int, validation_fraction: float, original: Path
) -> _Index:
    """Parses the file once; `size` and `modified` tell one content of it from another."""
    # Compact from the start: a list of integers takes several times the memory of the index.
    numbers, offsets, lengths, held = array("q"), array("q"), array("q"), array("b")
    digests = {"train": Fingerprint(), "validation": Fingerprint()}
    replaced = {"train": 0, "validation": 0}
    offset, kind = 0, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.strip()
            if number == 1:
                _check_beginning(content, original)
                content = content.removeprefix(_BYTE_ORDER_MARK)
            if content:
                document, bad = _parse(content, "", f"{original}:{number}")
                kind = kind or document.kind
                if document.kind != kind:
                    raise InputError(
                        f"{original}:{number}: is of the kind {document.kind}, the records before "
                        f"it are {kind}; put them into different files"
                    )
                key = content if document.record is None else key_of(document)
                out = held_out(key, validation_fraction)
                split = "validation" if out else "train"
                digests[split].add(content)
                replaced[split] += bad
                numbers.append(number)
                offsets.append(offset)
                lengths.append(len(line))
                held.append(out)
            offset += len(line)
    return _Index(
        *(np.array(values, np.int64) for values in (numbers, offsets, lengths)),
        np.array(held, bool),
        {split: digest.hexadecimal() for split, digest in digests.items()},
        replaced,
        kind or "text",
    )


def _check_beginning(content: bytes, path: Path) -> None:
    for beginning, what in _OTHER.items():
        if content.startswith(beginning):
            raise InputError(f"{path}: not JSON lines in UTF-8, but {what}")
    if b"\0" in content[:4]:
        raise InputError(f"{path}: not JSON lines in UTF-8, but UTF-16; save it as UTF-8")
    if content.removeprefix(_BYTE_ORDER_MARK).startswith(b"["):
        raise InputError(f"{path}:1: an array, not an object a line; name a list of records .json")


class _Lines(Sequence):
    """The documents of a JSONL file: one a line, found by its offset and length in bytes."""

    def __init__(
        self,
        path: Path,
        original: Path,
        numbers: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
    ):
        self._path, self._original = path, original
        self._numbers, self._offsets, self._lengths = numbers, offsets, lengths

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        number = int(self._numbers[index])  # Raises IndexError, which ends iteration.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.read(self._lengths[index])
        line = line.removeprefix(_BYTE_ORDER_MARK)
        name = f"{self._original.name}:{number}"
        return _parse(line, name, f"{self._original}:{number}")[0]


def _parse(line: bytes, name: str, where: str) -> tuple[Document, bool]:
    """Returns the document of a line of JSON, and whether text of it had to be repaired."""
    content, replaced = decode(line)
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a line of JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # Thousands of digits, or of brackets.
        reason = str(error).partition(";")[0]
        raise InputError(f"{where}: not a line of JSON that can be read: {reason}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(record).__name__}")
    document = _read(record, name, where)
    sound = _repaired(document)
    return sound, replaced or sound != document


def _read(record: dict[str, Any], name: str, where: str) -> Document:
    if is_preference(record):
        return read_preference(record, name, where)
    if is_problem(record):
        return read_problem(record, name, where)
    if "messages" in record and "text" not in record and not {"prompt", "response"} <= set(record):
        roles, contents = read_messages(record["messages"], where)
        weights = [float(role == "assistant") for role in roles]
        return Document(name, tuple(zip(contents, weights, strict=True)), roles)
    texts = []
    for field, weight in span_fields(record, where, _OTHERS):
        text = record[field]
        if not isinstance(text, str):
            raise InputError(f"{where}: {field} must be a string, got {type(text).__name__}")
        texts.append((text, weight))
    return Document(name, tuple(texts))


def _repaired(document: Document) -> Document:
    """JSON may escape half of a surrogate pair, which UTF-8 cannot hold: it reads as U+FFFD."""
    spans = tuple((sound(text), weight) for text, weight in document.spans)
    other = document.rejected
    return document._replace(
        spans=spans, rejected=_repaired(other) if other else None, record=sound(document.record)
    )


def sound(value: Any) -> Any:
    """A JSON value with all of its texts repaired: halves of surrogate pairs become U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [sound(one) for one in value]
    if isinstance(value, dict):
        return {sound(key): sound(one) for key, one in value.items()}
    return value
