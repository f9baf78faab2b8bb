"""Corpora of local files: one text, or a folder of texts.

A folder is read once when it is loaded; its documents are read again, one at a time, when they are
asked for.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.data.documents import Corpus, Document, decode
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
