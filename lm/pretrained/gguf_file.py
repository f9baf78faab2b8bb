"""The metadata and tensors of a GGUF file (versions 2 and 3, little endian), on a memory map.

Every count is compared with the bytes that are left before anything of that size is made.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm.errors import InputError, shown
from lm.pretrained.safetensors_file import Stored

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7

# Number of a type of values -> its NumPy type.
_SCALARS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}

# Number of a type of tensors -> name, weights in a block, bytes of a block.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_MOST_DIMENSIONS = 4


class GGUF(NamedTuple):
    """What a file holds: `metadata` by key, `tensors` by name with shapes [out, in]."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> GGUF:
    """Reads the header of a file; a tensor is read, and decoded, when it is asked for.

    Raises:
      InputError: no such file, cut short, damaged, or of a version or type that is not known.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    reader = _Reader(path, content)
    if bytes(content[:4]) != _MAGIC:
        raise InputError(f"{path}: not a GGUF file")
    reader.at = 4
    version = reader.scalar(4)
    if version not in (2, 3):
        if version in (2 << 24, 3 << 24):
            raise InputError(f"{path}: a big-endian GGUF file; valid: little-endian ones")
        raise InputError(f"{path}: version {version} of GGUF is not known; valid: 2 and 3")
    count, keys = reader.scalar(10), reader.scalar(10)
    # A tensor takes at least 32 bytes and a key 13.
    reader.need(32 * count + 13 * keys, f"{count:,} tensors and {keys:,} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = reader.string()
        if name in metadata:
            raise InputError(f"{path}: the key {shown(name)} is there twice")
        metadata[name] = reader.value(reader.scalar(4))
    described = [_describe(reader) for _ in range(count)]
    return GGUF(metadata, _tensors(reader, metadata, described))


def _describe(reader: "_Reader"):
    name, rank = reader.string(), reader.scalar(4)
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise InputError(f"{reader.path}: tensor {shown(name)} has {rank:,} dimensions")
    dims = [reader.scalar(10) for _ in range(rank)]
    if not all(dims):
        raise InputError(f"{reader.path}: tensor {shown(name)} has a dimension of 0")
    kind, offset = reader.scalar(4), reader.scalar(10)
    return name, tuple(reversed(dims)), kind, offset


def _tensors(reader: "_Reader", metadata, described) -> dict[str, Stored]:
    path, alignment = reader.path, metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment={shown(alignment, 40)} must be a power of two")
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    end, room = 0, len(reader.content) - start
    for name, shape, kind, offset in sorted(described, key=lambda one: one[3]):
        if kind not in TENSOR_TYPES:
            valid = ", ".join(known for known, *_ in TENSOR_TYPES.values())
            raise InputError(f"{path}: {shown(name)} is of type {kind}; valid: {valid}")
        type_name, weights, size = TENSOR_TYPES[kind]
        if name in tensors or shape[-1] % weights or offset % alignment or offset < end:
            raise InputError(
                f"{path}: tensor {shown(name)} of shape {list(shape)} and type {type_name} at "
                f"{offset:,} is there twice, overlaps another or does not fill its blocks"
            )
        end = offset + math.prod(shape) // weights * size
        if end > room:
            raise InputError(
                f"{path}: tensor {shown(name)} ends at byte {start + end:,} of "
                f"{len(reader.content):,}: the file is cut short or damaged"
            )
        raw = reader.content[start + offset : start + end]
        tensors[name] = Stored(shape, type_name, _decoder(raw, type_name, shape))
    return tensors


def _decoder(raw: np.ndarray, name: str, shape: tuple[int, ...]):
    def read() -> np.ndarray:
        if name in _FLOATS:
            return raw.view(_FLOATS[name]).reshape(shape)
        quants = _gguf()
        kind = quants.GGMLQuantizationType[name]
        with np.errstate(all="ignore"):  # Who loads a tensor refuses what is not finite.
            return quants.dequantize(raw.reshape(*shape[:-1], -1), kind).reshape(shape)

    return read


def _gguf():
    try:
        from gguf import quants
    except ImportError:
        raise InputError(
            "quantized weights of a .gguf need the package gguf: pip install 'nibble-lm[gguf]'"
        ) from None
    return quants


class _Reader:
    """Reads values one after the other, none beyond the end of the file."""

    def __init__(self, path: Path, content: np.ndarray):
        self.path, self.content, self.at = path, content, 0

    def need(self, size: int, what: str) -> None:
        """Raises InputError unless `size` more bytes are there."""
        if size > len(self.content) - self.at:
            raise InputError(
                f"{self.path}: {what} at byte {self.at:,} of {len(self.content):,}: the file is "
                "cut short or damaged"
            )

    def take(self, size: int, what: str) -> np.ndarray:
        """The next bytes."""
        self.need(size, what)
        self.at += size
        return self.content[self.at - size : self.at]

    def scalar(self, kind: int) -> Any:
        """One number or truth value."""
        dtype = np.dtype(_SCALARS[kind])
        (value,) = self.take(dtype.itemsize, "a number").view(dtype)
        if dtype == np.float32:
            # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
            return float(str(value))
        return value.item()

    def string(self) -> str:
        """A text in UTF-8 after its length."""
        size = self.scalar(10)
        content = self.take(size, f"a text of {size:,} bytes")
        try:
            return content.tobytes().decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: a text before byte {self.at:,} is no UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a truth value, a text, or an array of one of them."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self._check(kind)
            return self.scalar(kind)
        kind, count = self.scalar(4), self.scalar(10)
        if kind == _STRING:
            self.need(8 * count, f"{count:,} texts")
            return self._strings(count)
        self._check(kind)
        dtype = np.dtype(_SCALARS[kind])
        return self.take(count * dtype.itemsize, f"{count:,} numbers").view(dtype)

    def _check(self, kind: int) -> None:
        if kind not in _SCALARS:
            raise InputError(f"{self.path}: a value of type {kind} before byte {self.at:,}")

    def _strings(self, count: int) -> list[str]:
        # A view, as a NumPy array is slow for many small texts. Nothing else of the file is read.
        content, at, found = memoryview(self.content), self.at, []
        try:
            for _ in range(count):
                (size,) = struct.unpack_from("<Q", content, at)
                if size > len(content) - at - 8:
                    raise struct.error
                found.append(str(content[at + 8 : at + 8 + size], "utf-8"))
                at += 8 + size
        except (struct.error, UnicodeDecodeError):
            raise InputError(
                f"{self.path}: text {len(found):,} of {count:,} at byte {at:,} is cut short or "
                "damaged"
            ) from None
        self.at = at
        return found
