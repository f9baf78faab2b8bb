"""Corpora of local files: one text, a folder of texts, or a file of JSON lines.

A folder and JSON lines are read once when they are loaded, so that a bad line is found before
anything else starts; their documents are read again, one at a time, when they are asked for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lm.data.documents import Corpus, Document, decode, span_fields
from lm.data.hashing import fingerprint, held_out
from lm.errors import InputError


def load_file(name: str, path: Path) -> Corpus:
    """Loads one text file as a corpus of one document.

    Raises:
      InputError: it has a NUL byte, which text has not.
    """
    content = _read(path)
    if b"\0" in content:
        raise InputError(f"{path}: has a NUL byte, so it is not text")
    text, replaced = decode(content)
    documents = [Document(path.name, ((text, 1.0),))]
    return Corpus(name, documents, fingerprint([content]), int(replaced))


def load_folder(name: str, root: Path, split: str, validation_fraction: float) -> Corpus:
    """Loads the files under `root` that are text, split by a hash of their relative path.

    Text is what has no NUL byte. Hidden files and folders are left out, links to folders are not
    followed.
    """
    members = []
    replaced = 0

    def contents() -> Iterator[bytes]:
        nonlocal replaced
        for member in _visible_files(root):
            key = os.fsencode(member)
            if held_out(key, validation_fraction) != (split == "validation"):
                continue
            content = _read(root / member)
            if b"\0" not in content:
                members.append(member)
                replaced += decode(content)[1]
                yield key
                yield content

    digest = fingerprint(contents())
    return Corpus(name, _Files(root, members), digest, replaced)


class _Files(Sequence):
    """The documents of a folder: one a file."""

    def __init__(self, root: Path, names: list[str]):
        self._root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Document:
        name = self._names[index]
        text, _ = decode((self._root / name).read_bytes())
        return Document(name, ((text, 1.0),))


def _visible_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        # In place, which is how os.walk is told where to go on.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def load_jsonl(name: str, path: Path, split: str, validation_fraction: float) -> Corpus:
    """Loads a file of JSON objects, one a line, split by a hash of the line.

    Raises:
      InputError: a line, of either split, is not an object with the strings `text`, or `prompt`
        and `response`; the message opens with the file and the line's number.
    """
    numbers, offsets, lengths = [], [], []
    replaced = 0

    def lines() -> Iterator[bytes]:
        nonlocal replaced
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = line.strip()
                if content:
                    _, bad = _parse(content, f"{path}:{number}")
                    if held_out(content, validation_fraction) == (split == "validation"):
                        numbers.append(number)
                        offsets.append(offset)
                        lengths.append(len(line))
                        replaced += bad
                        yield content
                offset += len(line)

    digest = fingerprint(lines())
    return Corpus(name, _Lines(path, numbers, offsets, lengths), digest, replaced)


class _Lines(Sequence):
    """The documents of a JSONL file: one a line, found by its offset and length in bytes."""

    def __init__(self, path: Path, numbers: list[int], offsets: list[int], lengths: list[int]):
        self._path = path
        self._numbers = np.array(numbers, np.int64)
        self._offsets = np.array(offsets, np.int64)
        self._lengths = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        number = int(self._numbers[index])  # Raises IndexError, which ends iteration.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.read(self._lengths[index])
        spans, _ = _parse(line, f"{self._path}:{number}")
        return Document(f"{self._path.name}:{number}", spans)


def _parse(line: bytes, where: str) -> tuple[tuple[tuple[str, float], ...], bool]:
    """Returns the spans of a line of JSON, and whether its text had to be repaired."""
    content, replaced = decode(line)
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a line of JSON: {error.msg}") from error
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
