"""Files of records that are compressed, an array or parquet, as JSON lines in the cache."""

import gzip
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lm import strict_json
from lm.data.hashing import Fingerprint
from lm.errors import InputError

PLAIN = (".jsonl", ".ndjson")
_COMPRESSED = tuple(f"{plain}{packed}" for plain in PLAIN for packed in (".gz", ".zst"))
SUFFIXES = (*PLAIN, *_COMPRESSED, ".json", ".parquet")

# Text grows by less than this when it is decompressed; a file that does not is hostile.
_MOST_GROWTH = 1000
_CHUNK = 1 << 20

# The largest array of records, which is parsed as a whole.
_MOST_BYTES = 2_000_000_000


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
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.add(chunk)
    target = cache / "records" / f"{digest.hexadecimal()}.jsonl"
    if target.exists():
        return target
    convert = next(c for suffix, c in _CONVERSIONS.items() if name.endswith(suffix))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as scratch:
        try:
            convert(path, scratch)
        except InputError:
            os.unlink(scratch.name)
            raise
        except (OSError, EOFError, ValueError, RecursionError) as error:
            os.unlink(scratch.name)
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: cannot be read: {reason}") from None
    os.replace(scratch.name, target)
    return target


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
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path}: larger than {_MOST_BYTES:,} bytes; write it as .jsonl")
    records = json.loads(path.read_bytes().decode("utf-8-sig"))
    if not isinstance(records, list):
        kind = type(records).__name__
        raise InputError(f"{path}: must be a list of records, got {kind}; name JSON lines .jsonl")
    _write(iter(records), output)


def _from_parquet(path: Path, output: BinaryIO) -> None:
    parquet = _package("pyarrow.parquet", path)
    file = parquet.ParquetFile(path)
    wanted = [n for n in ("text", "prompt", "response") if n in file.schema_arrow.names]
    if not wanted:
        names = ", ".join(file.schema_arrow.names)
        raise InputError(f"{path}: needs text, or prompt and response; it has {names}")
    batches = file.iter_batches(batch_size=1024, columns=wanted)
    _write((record for batch in batches for record in batch.to_pylist()), output)


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
