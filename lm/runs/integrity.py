"""Whether the files of a checkpoint are those that were written."""

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from lm import strict_json

RECORD = "files.json"

# Orbax changes its own after the record is written; a restored state does not depend on it.
_NOT_RECORDED = ("_CHECKPOINT_METADATA", RECORD)

_BLOCK = 1 << 24  # bytes that are read at a time
_THREADS = 8


class _Digest(NamedTuple):
    """Length in bytes, and the CRC-32 of the content; None where it is not looked at."""

    length: int
    checksum: int | None


def write_record(folder: epath.Path) -> None:
    """Writes down length and CRC-32 of every file under `folder`.

    Neither OCDBT nor Zarr keeps a checksum of an array's data: a flipped byte restores as another
    number. To read what was just written takes 0.25 s a GiB and core, from the page cache. Of files
    in a bucket only the lengths are taken: it keeps checksums of its own, and this process would
    have to download what all processes have uploaded.
    """
    names = [name for name in _files(folder) if name not in _NOT_RECORDED]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _digest(folder / name), names)
        record = dict(zip(names, found, strict=True))
    (folder / RECORD).write_text(strict_json.dumps(record, indent=0) + "\n")


def damage(
    folder: epath.Path, part: int = 0, parts: int = 1, unread: Sequence[str] = ()
) -> str | None:
    """The first thing that is wrong with the files of a checkpoint, or "" where nothing is.

    Args:
      folder: of the checkpoint.
      part: of the files, looks only at this one of `parts` parts, counted from 0.
      parts: how many there are.
      unread: folders under it of which nothing will be restored: of their files the lengths are
        compared, and the contents are not read.

    Returns:
      One line; None when the checkpoint has no record, as those of older versions.
    """
    if not any(folder.iterdir()):
        return "it is empty"
    if not (folder / RECORD).exists():
        return None
    try:
        record = strict_json.loads((folder / RECORD).read_text())
        expected = {name: _Digest(*pair) for name, pair in sorted(record.items())}
    except (ValueError, TypeError, AttributeError):
        return f"{RECORD} is damaged"
    for name, digest in expected.items():
        if name.split("/")[0] in unread:
            expected[name] = digest._replace(checksum=None)
    mine = list(expected.items())[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda item: _compare(folder, *item), mine)
        return next(filter(None, problems), "")


def _compare(folder: epath.Path, name: str, expected: _Digest) -> str:
    path = folder / name
    if not path.exists():
        return f"{name} is missing"
    length = path.stat().length
    if length != expected.length:
        return f"{name} has {length:,} bytes, not {expected.length:,}"
    if expected.checksum is not None and _digest(path) != expected:
        return f"{name} has another checksum than when it was written"
    return ""


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            names += _files(path, f"{prefix}{path.name}/")
        else:
            names.append(prefix + path.name)
    return names


def _digest(path: epath.Path) -> _Digest:
    if "://" in str(path):
        return _Digest(path.stat().length, None)
    length = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            length += len(block)
            checksum = zlib.crc32(block, checksum)
    return _Digest(length, checksum)
