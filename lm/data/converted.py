"""Files of records that are compressed, an array or parquet, as JSON lines in the cache."""

import gzip
import importlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lm import strict_json
from lm.data.hashing import Fingerprint
from lm.data.preferences import LABELLED, PAIR, is_preference
from lm.data.problems import is_problem
from lm.errors import InputError

PLAIN = (".jsonl", ".ndjson")
_COMPRESSED = tuple(f"{plain}{packed}" for plain in PLAIN for packed in (".gz", ".zst"))
SUFFIXES = (*PLAIN, *_COMPRESSED, ".json", ".parquet")

# Text grows by less than this when it is decompressed; a file that does not is hostile.
_MOST_GROWTH = 1000
_CHUNK = 1 << 20

# What is read differently than by older commits, whose files in the cache are left alone.
_VERSIONS = {".parquet": ".parquet with problems"}

_SPACE = re.compile(r"[ \t\r\n]*")
_DAMAGED = (OSError, EOFError, ValueError, RecursionError, NotImplementedError, zlib.error)


def is_records(path: Path) -> bool:
    """Whether a file holds records, by its name; capital letters do not matter."""
    return path.name.lower().endswith(SUFFIXES)


def as_json_lines(path: Path, cache: Path) -> Path:
    """The file itself where it is JSON lines, otherwise a file of JSON lines in the cache.

    Args:
      path: of a file with one of `SUFFIXES`.
      cache: folder of the converted files; each is named by the content of its original.

    Raises:
      InputError: the file is damaged, larger than what is read, or needs a package that is not
        installed.
    """
    name = path.name.lower()
    if name.endswith(PLAIN):
        return path
    digest = Fingerprint()
    digest.add(_VERSIONS.get(_ending(name), _ending(name)).encode())
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.add(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    target = cache / "records" / f"{digest.hexadecimal()}.jsonl"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as scratch:
        try:
            _CONVERSIONS[_ending(name)](path, scratch)
            scratch.flush()
            os.replace(scratch.name, target)
        except BaseException as error:
            os.unlink(scratch.name)
            # What Python, zlib and Arrow raise for content that is damaged or not supported.
            if isinstance(error, InputError) or not isinstance(error, _DAMAGED):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: cannot be read: {reason}") from None
    return target


def _ending(name: str) -> str:
    """The end of a name that says how a file is converted."""
    return next(ending for ending in _CONVERSIONS if name.endswith(ending))


def _from_gzip(path: Path, output: BinaryIO) -> None:
    with gzip.open(path) as file:
        _copy(file, output, path)


def _from_zstandard(path: Path, output: BinaryIO) -> None:
    zstandard = _package("zstandard", path)
    with path.open("rb") as compressed:
        try:
            with zstandard.ZstdDecompressor().stream_reader(compressed) as file:
                _copy(file, output, path)
        except zstandard.ZstdError as error:
            raise ValueError(error) from None


def _copy(file: Any, output: BinaryIO, path: Path) -> None:
    """Copies a decompressed file, chunk by chunk."""
    left = max(_CHUNK, _MOST_GROWTH * path.stat().st_size)
    while chunk := file.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise InputError(f"{path}: grows by more than {_MOST_GROWTH} times when decompressed")
        if len(chunk) > shutil.disk_usage(output.name).free:
            raise OSError("no space left for the decompressed file")
        output.write(chunk)


def _from_array(path: Path, output: BinaryIO) -> None:
    """Writes the elements of a JSON array as they are spelled; holds one of them at a time."""
    # Bytes that are not UTF-8 go through as they are, to be counted with the index.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        beginning = ""
        while not beginning and (chunk := file.read(_CHUNK)):
            beginning = chunk.lstrip()
        if not beginning.startswith("["):
            raise InputError(f"{path}: must be a list of records; name JSON lines .jsonl")
        for element in _elements(file, beginning):
            # A line break is white space: strings of JSON have none.
            line = element.replace("\n", " ").replace("\r", " ")
            output.write(line.encode("utf-8", "surrogateescape") + b"\n")


def _elements(file: TextIO, text: str) -> Iterator[str]:
    """Yields each element of the array that `text` and the rest of `file` spell.

    Raises:
      ValueError: this is no array, or more than one.
      RecursionError: an element is nested too deeply.
    """
    decoder = json.JSONDecoder()
    at, number, separated = 1, 0, True
    while True:
        at = _SPACE.match(text, at).end()
        sign = text[at : at + 1]
        if sign == "]":
            break
        if sign == "," and not separated:
            at, separated = at + 1, True
            continue
        if sign and not separated:
            raise ValueError(f"no comma after element {number} of the array")
        try:
            _, end = decoder.raw_decode(text, at)
            reason = "the array has no end"
        except json.JSONDecodeError as error:
            end, reason = len(text), error.msg
        if end == len(text):  # The element may go on in the next chunk.
            more = file.read(max(_CHUNK, len(text) - at))
            if not more:
                raise ValueError(f"element {number + 1} of the array: {reason}")
            text, at = text[at:] + more, 0
            continue
        yield text[at:end]
        at, number, separated = end, number + 1, False
    if (text[at + 1 :] + file.read(_CHUNK)).strip():
        raise ValueError("there is more after the end of the array")


def _from_parquet(path: Path, output: BinaryIO) -> None:
    parquet = _package("pyarrow.parquet", path)
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    wanted = [n for n in ("text", "prompt", "response", "messages") if n in names]
    if is_preference(dict.fromkeys(names)):
        wanted = [n for n in ("prompt", *PAIR, *LABELLED) if n in names]
    elif is_problem(dict.fromkeys(names)):  # With all columns that JSON has a form for.
        wanted = [f.name for f in file.schema_arrow if _has_json(f.type)]
    if not wanted:
        raise InputError(
            f"{path}: needs text, or prompt and response, or messages, or prompt and answer, or "
            f"prompt, chosen and rejected, or prompt, completion and label; it has "
            f"{', '.join(names)}"
        )
    batches = file.iter_batches(batch_size=1024, columns=wanted)
    _write((record for batch in batches for record in batch.to_pylist()), output)


def _has_json(kind: Any) -> bool:
    """Whether values of an Arrow type are numbers, texts, or lists and objects of such."""
    types = importlib.import_module("pyarrow.types")
    if types.is_list(kind) or types.is_large_list(kind):
        return _has_json(kind.value_type)
    if types.is_struct(kind):
        return all(_has_json(kind.field(i).type) for i in range(kind.num_fields))
    numbers = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)
    return numbers or types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def _write(records: Iterator[Any], output: BinaryIO) -> None:
    for record in records:
        output.write(strict_json.dumps(record, ensure_ascii=True).encode() + b"\n")


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{path}: to read it, install the package {package}") from None


# End of a name -> (path, output) that writes JSON lines.
_CONVERSIONS: dict[str, Callable[[Path, BinaryIO], None]] = {
    ".gz": _from_gzip,
    ".zst": _from_zstandard,
    ".json": _from_array,
    ".parquet": _from_parquet,
}
