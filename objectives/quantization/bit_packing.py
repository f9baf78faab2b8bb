"""Integer codes of 1 to 8 bits as a dense string of bytes, and back, bit for bit. NumPy, no files.

n  number of codes
"""

import math
from collections.abc import Sequence

import numpy as np

_TRITS = 5  # 3^5 = 243 values in a byte: 1.6 bits a code
_POWERS_OF_3 = 3 ** np.arange(_TRITS, dtype=np.uint8)
# Codes are spread over one byte a bit on the way; a block at a time bounds that. Multiple of 8.
_BLOCK = 1 << 20


def packed_size(count: int, bits: float) -> int:
    """Bytes that `count` codes of `bits` bits take.

    Raises:
      ValueError: bits other than 1.58 and 1 to 8.
    """
    _check(bits)
    return -(-count // _TRITS) if bits == 1.58 else -(-count * int(bits) // 8)


def pack(codes: np.ndarray, bits: float) -> np.ndarray:
    """Codes of any shape -> uint8 [packed_size(n, bits)], in C order, the last byte zero-filled.

    Code i is at bits [i * bits, (i + 1) * bits) of the string, least significant bit first, also
    across bytes. With 1.58 bits, five codes c of {0, 1, 2} are a byte, sum_j c_j 3^j.

    Args:
      codes: integers in [0, 2^bits), or [0, 3) for 1.58 bits.
      bits: 1.58, or 1 to 8.

    Raises:
      ValueError: other bits, or codes out of range.
    """
    _check(bits)
    codes = np.asarray(codes).reshape(-1)
    levels = 3 if bits == 1.58 else 2 ** int(bits)
    if codes.size and (codes.min() < 0 or codes.max() >= levels):
        raise ValueError(f"codes of {bits:g} bits must be in [0, {levels}); got {codes.max()}")
    codes = codes.astype(np.uint8)
    if bits == 1.58:
        codes = np.pad(codes, (0, -codes.size % _TRITS)).reshape(-1, _TRITS)
        return codes @ _POWERS_OF_3
    blocks = [
        np.packbits(
            np.unpackbits(block[:, None], axis=1, count=int(bits), bitorder="little"),
            bitorder="little",
        )
        for block in np.split(codes, range(_BLOCK, codes.size, _BLOCK))
    ]
    return np.concatenate(blocks)


def unpack(packed: np.ndarray, bits: float, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 codes of `shape` that `pack` made `packed` of.

    Raises:
      ValueError: other bits, or a number of bytes that does not fit the shape.
    """
    count = math.prod(shape)
    packed = np.asarray(packed, np.uint8)
    if packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count} codes of {bits:g} bits take {packed_size(count, bits)} bytes; "
            f"got {packed.shape}"
        )
    if bits == 1.58:
        return (packed[:, None] // _POWERS_OF_3 % 3).reshape(-1)[:count].reshape(shape)
    width = int(bits)
    codes = np.empty(count, np.uint8)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        part = packed[start * width // 8 : -(-(start + size) * width // 8)]
        spread = np.unpackbits(part, count=size * width, bitorder="little").reshape(size, width)
        codes[start : start + size] = np.packbits(spread, axis=1, bitorder="little")[:, 0]
    return codes.reshape(shape)


def packed_layers_size(count: int, bits: Sequence[float]) -> int:
    """Bytes of `pack_layers` of layers with `count` codes each."""
    return sum(packed_size(count, width) for width in bits)


def pack_layers(codes: np.ndarray, bits: Sequence[float]) -> np.ndarray:
    """Codes [L, ...] -> uint8: `pack` of each layer at its own width, one after the other.

    Args:
      codes: of the layers.
      bits: the width of each.

    Raises:
      ValueError: another number of widths than of layers, and as `pack`.
    """
    return np.concatenate([pack(layer, b) for layer, b in zip(codes, bits, strict=True)])


def unpack_layers(packed: np.ndarray, bits: Sequence[float], shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 codes of `shape` that `pack_layers` made `packed` of.

    Raises:
      ValueError: as there, or a number of bytes that does not fit the shape.
    """
    packed = np.asarray(packed, np.uint8)
    if not shape or len(bits) != shape[0]:
        raise ValueError(f"{len(bits)} widths for codes of shape {shape}")
    sizes = [packed_size(math.prod(shape[1:]), width) for width in bits]
    if packed.shape != (sum(sizes),):
        raise ValueError(f"codes {shape} take {sum(sizes)} bytes; got {packed.shape}")
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    return np.stack([unpack(x, b, shape[1:]) for x, b in zip(parts, bits, strict=True)])


def _check(bits: float) -> None:
    if bits != 1.58 and bits not in range(1, 9):
        raise ValueError(f"codes have 1.58, or 1 to 8 bits; got bits={bits:g}")
