"""Codes come back bit for bit from as few bytes as their width says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.quantization import bit_packing, pack, packed_size, unpack

WIDTHS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 70), st.integers(0, 2**16))
def test_round_trip(bits, count, seed):
    levels = 3 if bits == 1.58 else 2**bits
    codes = np.random.default_rng(seed).integers(0, levels, count).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(count, bits)
    np.testing.assert_array_equal(unpack(packed, bits, (count,)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_and_shapes(bits, monkeypatch):
    levels = 3 if bits == 1.58 else 2**bits
    codes = np.random.default_rng(0).integers(0, levels, (3, 5, 7)).astype(np.uint8)
    whole = pack(codes, bits)
    monkeypatch.setattr(bit_packing, "_BLOCK", 16)
    np.testing.assert_array_equal(pack(codes, bits), whole)
    np.testing.assert_array_equal(unpack(whole, bits, codes.shape), codes)


def test_layout():
    """The format is for others to read: least significant bit first, across bytes."""
    np.testing.assert_array_equal(pack(np.array([1, 2, 3, 0, 3]), 2), [0b00111001, 0b11])
    codes = np.array([5, 1, 7, 2, 6, 0, 3, 4, 1])
    string = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    np.testing.assert_array_equal(pack(codes, 3), list(string.to_bytes(4, "little")))
    np.testing.assert_array_equal(pack(np.array([2, 1, 0, 2, 2, 1]), 1.58), [2 + 3 + 54 + 162, 1])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: pack(np.array([4]), 2), r"codes of 2 bits must be in \[0, 4\); got 4"),
        (lambda: pack(np.array([3]), 1.58), r"in \[0, 3\)"),
        (lambda: pack(np.array([-1]), 8), r"in \[0, 256\)"),
        (lambda: pack(np.array([0]), 9), "got bits=9"),
        (lambda: unpack(np.zeros(2, np.uint8), 4, (5,)), "5 codes of 4 bits take 3 bytes"),
    ],
)
def test_bad_arguments(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
