"""What a reader of files from outside may do with a damaged one: refuse it in one line."""

import tracemalloc

import numpy as np

from lm.errors import InputError


def refused(read, path, expected: str = "") -> str:
    """The one line with which `read(path)` refuses a file; it names the file and is short."""
    try:
        read(path)
    except InputError as error:
        line = str(error)
        assert line.isprintable(), line
        assert str(path) in line
        assert len(line) < 500 + len(str(path))
        assert expected in line, line
        return line
    raise AssertionError(f"{path} was read")


def read_all(read, path) -> bool:
    """Whether a file is read, each of its tensors with its shape; otherwise it is refused."""
    try:
        tensors = read(path)
    except InputError:
        refused(read, path)
        return False
    for stored in tensors.values():
        assert stored.read().shape == stored.shape
    return True


def flipped(content: bytes, seed: int, most: int) -> bytes:
    """`content` with one to three other bytes among its first `most`."""
    rng, changed = np.random.default_rng(seed), bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(most)] = rng.choice([0, 1, 9, 34, 45, 46, 91, 127, 128, 255])
    return bytes(changed)


def peak_bytes(function) -> int:
    """Most bytes that Python and NumPy have allocated at a time in a call, errors included."""
    tracemalloc.start()
    try:
        function()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak
