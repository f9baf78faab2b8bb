"""The tensors of a safetensors file, on a memory map; nothing is read before it is asked for."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm.errors import InputError, shown

# Bytes of a header; larger ones are refused, as by the safetensors library.
_MOST_HEADER = 100_000_000
_MOST_DIMENSIONS = 8

# Name of a type of numbers -> its NumPy type. Parameters are read from floats alone.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Stored(NamedTuple):
    """A tensor in a file: `read` maps it, or decodes it to float32."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Name -> tensor, after the header has been checked against the size of the file.

    Raises:
      InputError: the file is missing, cut short or damaged, or holds another type of numbers.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():  # A named pipe would be waited for.
            raise InputError(f"{path}: not a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise InputError(f"{path}: not a whole safetensors file ({size:,} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(
            f"{path}: its safetensors header is not JSON, or has a key twice"
        ) from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    start, end = 8 + length, 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: _place(item[1])):
        shape, dtype, begin = _check(path, name, entry, end, size - start)
        end = begin + math.prod(shape) * dtype.itemsize
        tensors[name] = _stored(path, shape, entry["dtype"], start + begin)
    if end != size - start:
        raise InputError(f"{path}: {size - start:,} bytes of tensors, and its header says {end:,}")
    return tensors


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _place(entry: Any) -> tuple[int, int]:
    """First byte and end, so that a tensor of no bytes comes before one that begins there."""
    try:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError, OverflowError):
        return -1, -1


def _check(path: Path, name: str, entry: Any, end: int, room: int):
    """Shape, dtype and first byte of a tensor that begins where the one before has ended."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: the header's entry of {shown(name)} is not that of a tensor")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if (
            not isinstance(numbers, list)
            or len(numbers) > _MOST_DIMENSIONS
            or not all(type(n) is int and 0 <= n < 2**53 for n in numbers)
        ):
            raise InputError(
                f"{path}: shape and data_offsets of {shown(name)} must be up to "
                f"{_MOST_DIMENSIONS} whole numbers"
            )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise InputError(
            f"{path}: {shown(name)} is of type {shown(entry['dtype'], 20)}; valid: "
            f"{', '.join(DTYPES)}"
        )
    if math.prod(n for n in shape if n) >= 2**53:
        raise InputError(f"{path}: {shown(name)} of shape {shown(shape)} is too large")
    dtype = DTYPES[entry["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[0] != end or offsets[1] != end + size or offsets[1] > room:
        raise InputError(
            f"{path}: {shown(name)} of shape {shown(shape)} should take bytes {end:,} to "
            f"{end + size:,} of {room:,}, and the header says {shown(offsets)}: cut short or "
            "damaged"
        )
    return tuple(shape), dtype, offsets[0]


def _stored(path: Path, shape: tuple[int, ...], dtype: str, offset: int) -> Stored:
    def read() -> np.ndarray:
        if not math.prod(shape):
            return np.zeros(shape, DTYPES[dtype])
        raw = np.memmap(path, np.uint8, "r", offset, (math.prod(shape) * DTYPES[dtype].itemsize,))
        # A view of bytes may begin anywhere.
        return raw.view(DTYPES[dtype]).reshape(shape)

    return Stored(shape, dtype, read)
