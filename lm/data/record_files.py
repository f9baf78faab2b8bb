"""Files of records, as JSON lines: plain, compressed, a JSON array, or Parquet.

What a file holds is told from its first bytes, not from its name. All but plain JSON lines are
converted into the cache once, whole or not at all, and read from there by offset.
"""

import codecs
import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lm.data.documents import Corpus, span_fields
from lm.data.hashing import fingerprint
from lm.data.json_lines import load_lines
from lm.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = (".gz", ".zst")

_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z"}
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")

# Text shrinks tenfold at most, repetitive text further. A file that grows more than this, once it
# is past the first bytes, is a mistake or an attack.
_MOST_GROWTH = 500
_GROWTH_FROM = 100_000_000

# What a conversion leaves free on the disk of the cache.
_FREE = 500_000_000


def has_records(path: Path) -> bool:
    """Whether a file's name, in any case, is that of JSON lines, a JSON array or Parquet."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def load_records(
    name: str, path: Path, split: str, validation_fraction: float, cache: Path
) -> Corpus:
    """Loads a file of records, split by a hash of each record.

    Args:
      name: of the corpus, as it was written in the config.
      path: of the file.
      split: `train` or `validation`.
      validation_fraction: the share of records that is held out.
      cache: the folder for what is converted.

    Raises:
      InputError: the file holds something else, is broken, or a record is malformed (see
        `lm.data.json_lines`).
    """
    return load_lines(name, as_lines(path, cache), split, validation_fraction, path)


def as_lines(path: Path, cache: Path) -> Path:
    """The file itself, or its conversion to JSON lines in `cache`.

    Raises:
      InputError: it cannot be read or converted; the message says what it is.
    """
    convert = _converter(path, path)
    if convert is None:
        return path
    stat = path.stat()
    key = fingerprint(
        [os.fsencode(path.resolve()), str(stat.st_size).encode(), str(stat.st_mtime_ns).encode()]
    )
    target = cache / f"{path.name}_{key[:16]}.jsonl"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache) as scratch:
            made = Path(scratch) / "first"
            _write(made, convert(), stat.st_size, path)
            # A compressed file may hold an array.
            if (inner := _converter(made, path)) is not None:
                made, size = Path(scratch) / "second", made.stat().st_size
                _write(made, inner(), size, path)
            os.replace(made, target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be converted in {cache}: {reason}") from error
    return target


def _converter(path: Path, of: Path) -> Callable[[], Iterator[bytes]] | None:
    """What yields a file's JSON lines in chunks; None where it holds them as they are."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head.startswith(_GZIP):
                return lambda: _read(lambda: gzip.open(path), of)
            if head.startswith(_ZSTD):
                return lambda: _read(lambda: _zstd(path, of), of)
            if head.startswith(_PARQUET):
                return lambda: _parquet(path, of)
            for magic, packer in _PACKERS.items():
                if head.startswith(magic):
                    raise InputError(f"{of}: is compressed by {packer}; use gzip or zstd, or none")
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
                raise InputError(f"{of}: is UTF-16 or UTF-32; save it as UTF-8")
            head = head.removeprefix(codecs.BOM_UTF8).lstrip()
            while not head and (chunk := file.read(_CHUNK)):
                head = chunk.lstrip()
    except OSError as error:
        raise InputError(f"cannot read {of}: {error.strerror}") from error
    if path == of and path.suffix.lower() == ".parquet":
        raise InputError(f"{of}: is not Parquet")
    return (lambda: _array(path, of)) if head.startswith(b"[") else None


def _write(target: Path, chunks: Iterator[bytes], size: int, of: Path) -> None:
    """Writes a converted file, and checks its size as it grows; `size` is that of the source."""
    most = max(_GROWTH_FROM, _MOST_GROWTH * size)
    written = 0
    with target.open("wb") as file:
        for chunk in chunks:
            written += len(chunk)
            if written > most:
                raise InputError(
                    f"{of}: is compressed, and more than {_MOST_GROWTH} times as large in full"
                )
            if shutil.disk_usage(target.parent).free < len(chunk) + _FREE:
                raise InputError(
                    f"{of}: the disk of the cache {target.parent.parent} is full; data.directory"
                    " names another one"
                )
            file.write(chunk)


def _read(opened: Callable[[], IO[bytes]], of: Path) -> Iterator[bytes]:
    """Yields the content of a compressed file in chunks."""
    try:
        with opened() as file:
            while chunk := file.read(_CHUNK):
                yield bytes(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{of}: is compressed, but broken or cut short: {error}") from None


def _zstd(path: Path, of: Path) -> IO[bytes]:
    """Opens a file that zstd compressed."""
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"{of}: is compressed by zstd, which needs a package: pip install pyarrow"
        ) from None
    return pyarrow.input_stream(str(path), compression="zstd")


def _parquet(path: Path, of: Path) -> Iterator[bytes]:
    """Yields the rows of a Parquet file as JSON lines, with the fields of documents alone."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{of}: Parquet needs a package: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            fields = [field for field, _ in span_fields(file.schema_arrow.names, str(of))]
            for batch in file.iter_batches(batch_size=1000, columns=fields):
                lines = (json.dumps(row, default=str) for row in batch.to_pylist())
                yield "".join(line + "\n" for line in lines).encode()
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{of}: is Parquet, but cannot be read: {reason}") from None


def _array(path: Path, of: Path) -> Iterator[bytes]:
    """Yields the elements of a JSON array, each as it is spelled, one a line.

    Holds one element, or one chunk, in memory.
    """
    decoder = json.JSONDecoder()
    # Bytes that are not UTF-8 go through as they are, to be counted by the index.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = ""
        while not (text := text.lstrip()):
            text = file.read(_CHUNK)
        at, number, separated = 1, 0, True
        while True:
            at = _SPACE.match(text, at).end()
            sign = text[at : at + 1]
            if sign == "]":
                break
            if sign == "," and not separated:
                at, separated = at + 1, True
                continue
            where = f"{of}: is an array; element {number + 1}"
            if sign and not separated:
                raise InputError(f"{of}: is an array; no comma after element {number}")
            try:
                _, end = decoder.raw_decode(text, at)
                reason = "the array has no end"
            except json.JSONDecodeError as error:
                end, reason = len(text), error.msg
            except (ValueError, RecursionError):
                raise InputError(
                    f"{where}: an integer has too many digits, or brackets are nested too deeply"
                ) from None
            if end == len(text):  # It may go on in the next chunk.
                more = file.read(max(_CHUNK, len(text) - at))
                if not more:
                    raise InputError(f"{where}: {reason}")
                text, at = text[at:] + more, 0
                continue
            line = text[at:end].replace("\n", " ").replace("\r", " ")
            yield line.encode("utf-8", "surrogateescape") + b"\n"
            at, number, separated = end, number + 1, False
        if (text[at + 1 :] + file.read(_CHUNK)).strip():
            raise InputError(
                f"{of}: is an array, with more after its end; make each line an object"
            )
