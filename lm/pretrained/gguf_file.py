"""GGUF files, versions 2 and 3: metadata and tensors, read from a memory map.

A file is untrusted. Every count and length in it is compared to the bytes that are left before
memory is taken, so that a file of N bytes costs memory in proportion to N, and nothing in it is
executed. Reading a file costs its metadata; a tensor is read and dequantized when it is asked for.

Layout, all little endian: "GGUF", uint32 version, uint64 tensors, uint64 keys; the keys (name,
type, value); the tensors (name, dims with the fastest axis first, type, offset in the data);
padding to `general.alignment` (32 by default); the data. A string is a uint64 length and UTF-8; an
array is the type of its elements, a uint64 length and the elements.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import itertools
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import InputError

# Weights of a block and its bytes, by the number that the file holds.
_TYPES = {
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
# Types that are refused by name.
_OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_KEY_BYTES = 8 + 4 + 1  # At least: a length, a type and one byte.
_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # At least: a length, a count, a dim, a type and an offset.
_DEPTH = 4  # Arrays of arrays, at most.
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file, which stays there until it is read.

    Attributes:
      name: of the tensor.
      shape: in the order of NumPy and Hugging Face, so that a linear weight is [out, in].
      type: "F32" or "Q4_1", for instance.
      number: of that type in the file.
      data: its bytes in the mapping, uint8.
      where: the file, for messages.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    number: int
    data: np.ndarray = dataclasses.field(repr=False)
    where: str

    def read(self) -> np.ndarray:
        """The values, float32 of `shape`; dequantized by the package `gguf` unless floats.

        Raises:
          InputError: the values are quantized and the package `gguf` is not installed.
        """
        if self.type == "F32":
            values = self.data.view("<f4").astype(np.float32)
        elif self.type == "F16":
            values = self.data.view("<f2").astype(np.float32)
        elif self.type == "BF16":
            values = (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = self._dequantize()
        return np.asarray(values).reshape(self.shape)

    def _dequantize(self) -> np.ndarray:
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError:
            raise InputError(
                f"{self.where}: tensor {_shown(self.name)} of type {self.type} needs the package"
                " gguf: pip install 'nibble-lm[gguf]'"
            ) from None
        rows = np.asarray(self.data).reshape(math.prod(self.shape[:-1]), -1)
        # A scale may be infinite or not a number: that is the value then, without a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            return quants.dequantize(rows, GGMLQuantizationType(self.number))


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What `read_gguf` finds in a file.

    Attributes:
      metadata: key -> a string, number or bool; an array of numbers or bools is a NumPy array, one
        of strings or of arrays a list.
      tensors: name -> tensor, in the order of the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Maps a file and reads its metadata and the places of its tensors.

    Raises:
      InputError: the file cannot be read, is not GGUF of version 2 or 3 in little endian, is
        damaged, or holds a tensor of a type that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; needs a GGUF file")
    try:
        # The mapping of an empty file is refused by the operating system.
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    cursor = _Cursor(data, str(path))
    if cursor.bytes(4, "the file's first bytes") != b"GGUF":
        raise InputError(f"{path}: not a GGUF file, as it does not begin with GGUF")
    version = cursor.number("<u4", "the version")
    if version not in (2, 3):
        hint = " (big endian)" if version in (2 << 24, 3 << 24) else ""
        raise InputError(f"{path}: GGUF version {version}{hint}; valid are 2 and 3, little endian")
    num_tensors = cursor.number("<u8", "the number of tensors")
    num_keys = cursor.number("<u8", "the number of keys")
    metadata = _read_metadata(cursor, num_keys)
    return GGUFFile(metadata, _read_tensors(cursor, num_tensors, _alignment(metadata, str(path))))


def llama_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads * H, ...], from the order of GGUF to that of Hugging Face.

    GGUF files of the Llama family interleave the two halves of each head. `heads` is the number of
    key-value heads for k.
    """
    return _swapped_rows(w, heads, 2)


def gguf_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads * H, ...], from the order of Hugging Face to that of GGUF."""
    return _swapped_rows(w, heads, 1)


def _swapped_rows(w: np.ndarray, heads: int, halves_axis: int) -> np.ndarray:
    if heads < 1 or w.shape[0] % (2 * heads):
        raise InputError(f"{w.shape[0]} rows of q or k cannot be split into {heads} even heads")
    half = w.shape[0] // heads // 2
    split = (heads, 2, half) if halves_axis == 1 else (heads, half, 2)
    return w.reshape(*split, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


class _Cursor:
    """Takes values from the mapping in order, and none from behind its end."""

    def __init__(self, data: np.ndarray, where: str):
        self.data, self.where, self.offset = data, where, 0
        self._view = memoryview(data)

    def left(self) -> int:
        """How many bytes have not been taken."""
        return len(self._view) - self.offset

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.where}: {problem}")

    def need(self, count: int, size: int, what: str) -> None:
        """Refuses `count` things of at least `size` bytes each where fewer bytes are left."""
        if count * size > self.left():
            raise self.fail(
                f"{what} needs {count * size} bytes or more at byte {self.offset}, but"
                f" {self.left()} are left: the file is cut off or damaged"
            )

    def bytes(self, size: int, what: str) -> bytes:
        self.need(size, 1, what)
        self.offset += size
        return bytes(self._view[self.offset - size : self.offset])

    def number(self, dtype: str, what: str) -> int | float:
        return self.array(dtype, 1, what)[0].item()

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        """A copy, in the byte order of the machine."""
        kind = np.dtype(dtype)
        raw = self.bytes(count * kind.itemsize, what)
        return np.frombuffer(raw, kind).astype(kind.newbyteorder("="))

    def string(self, what: str) -> str:
        size = struct.unpack("<Q", self.bytes(8, what))[0]
        try:
            return self.bytes(size, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what}, before byte {self.offset}, is not UTF-8") from None


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.need(count, _KEY_BYTES, f"metadata of {count} keys")
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the name of key {index}")
        if key in metadata:
            raise cursor.fail(f"key {_shown(key)} is there twice")
        what = f"key {_shown(key)}"
        metadata[key] = _read_value(cursor, cursor.number("<u4", what), what)
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what, depth + 1)
    return _read_numbers(cursor, kind, 1, what)[0].item()


def _read_array(cursor: _Cursor, what: str, depth: int) -> Any:
    if depth > _DEPTH:
        raise cursor.fail(f"{what} has arrays in arrays, more than {_DEPTH} deep")
    kind = cursor.number("<u4", what)
    count = cursor.number("<u8", what)
    if kind not in (_STRING, _ARRAY):
        return _read_numbers(cursor, kind, count, what)
    cursor.need(count, 8 if kind == _STRING else 12, f"{what}, an array of {count},")
    return [_read_value(cursor, kind, what, depth) for _ in range(count)]


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    if kind == _BOOL:
        values = cursor.array("<u1", count, what)
        if (values > 1).any():
            raise cursor.fail(f"{what} has a bool that is neither 0 nor 1")
        return values.astype(bool)
    if kind not in _NUMBERS:
        raise cursor.fail(f"{what} has a value of type {kind}; valid are 0 to 12")
    return cursor.array(_NUMBERS[kind], count, what)


def _alignment(metadata: dict[str, Any], where: str) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise InputError(
            f"{where}: general.alignment must be a power of two, got {str(value)[:60]!r}"
        )
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    cursor.need(count, _TENSOR_BYTES, f"a list of {count} tensors")
    entries: dict[str, tuple] = {}
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        if name in entries:
            raise cursor.fail(f"tensor {_shown(name)} is there twice")
        entries[name] = _read_entry(cursor, f"tensor {_shown(name)}")
    start = -(-cursor.offset // alignment) * alignment
    available = max(0, len(cursor.data) - start)
    tensors, places = {}, []
    for name, (shape, number, offset) in entries.items():
        kind, weights, size = _TYPES[number]
        num_bytes = math.prod(shape) // weights * size
        what = f"tensor {_shown(name)}"
        if offset % alignment:
            raise cursor.fail(f"{what} begins at {offset}, no multiple of {alignment}")
        if offset + num_bytes > available:
            raise cursor.fail(
                f"{what} ends at byte {offset + num_bytes} of the data, which has {available}: the"
                " file is cut off or damaged"
            )
        data = cursor.data[start + offset : start + offset + num_bytes]
        tensors[name] = GGUFTensor(name, shape, kind, number, data, cursor.where)
        places.append((offset, offset + num_bytes, name))
    places.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(places):
        if begin < end:
            raise cursor.fail(f"tensors {_shown(name)} and {_shown(other)} overlap")
    return tensors


def _read_entry(cursor: _Cursor, what: str) -> tuple[tuple[int, ...], int, int]:
    """(shape, number of the type, offset in the data) of the next tensor in the list."""
    num_dims = cursor.number("<u4", what)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.fail(f"{what} has {num_dims} dims; valid are 1 to {_MAX_DIMS}")
    shape = tuple(cursor.array("<u8", num_dims, what).tolist()[::-1])
    number = cursor.number("<u4", what)
    offset = cursor.number("<u8", what)
    if number not in _TYPES:
        name = _OTHER_TYPES.get(number, "unknown")
        valid = ", ".join(name for name, _, _ in _TYPES.values())
        raise cursor.fail(f"{what} has the type {number} ({name}); valid are {valid}")
    name, weights, size = _TYPES[number]
    if 0 in shape or math.prod(shape) // weights * size > len(cursor.data):
        raise cursor.fail(f"{what} has the shape {shape}, which the file cannot hold")
    if shape[-1] % weights:
        raise cursor.fail(f"{what} has rows of {shape[-1]}, no multiple of {weights} for {name}")
    return shape, number, offset


def _shown(name: str) -> str:
    """A name from the file on one line, at most 60 characters of it."""
    return repr(name[:60])
