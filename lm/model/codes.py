"""Token codes: K bits computed from an id, without a table, and their lift to a vector.

K bits of a code, D width, V vocabulary. Bits are the last axis, least significant first.

The codes are those of "Fixed minimal binary token codes" (arXiv 2605.09751): K = ceil(log2 V) bits
of the id itself, or of an affine recoding of it over GF(2). Random codes are a control of ours,
after the frozen random codes of the same author's earlier work (arXiv 2507.04886).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Values of the bits (0, 1), and the mean of their squares over evenly used codes.
VALUES = {"zero_one": (0, 1), "plus_minus_one": (-1, 1)}
MEAN_SQUARE = {"zero_one": 0.5, "plus_minus_one": 1.0}

_WORD = 32  # bits of a code that the permutation of `random_codes` covers
_ROUNDS = 8  # of the Feistel network; four make a good cipher of a good round function


def minimal_bits(vocab_size: int) -> int:
    """ceil(log2 V), the fewest bits that tell V ids apart; at least 1."""
    return max((vocab_size - 1).bit_length(), 1)


def token_codes(ids: jax.Array, num_bits: int) -> jax.Array:
    """The binary codes of ids: bit j = (id >> j) & 1 (arXiv 2605.09751, variant "fixed code").

    Shifts only: no table, no gather. That the paper writes the plain id in K bits is confirmed by
    its model cards; which end comes first is not, and is a permutation of channels.

    Args:
      ids: [...] non-negative integers below 2^num_bits; of larger ones the upper bits are lost.
      num_bits: K, at most 31 for int32.

    Returns:
      [..., K] of {0, 1} in the dtype of the ids, least significant bit first.

    Raises:
      ValueError: K is below 1 or more than the ids' dtype holds.
    """
    ids = jnp.asarray(ids)
    most = jnp.iinfo(ids.dtype).bits - jnp.issubdtype(ids.dtype, jnp.signedinteger)
    if not 1 <= num_bits <= most:
        raise ValueError(f"num_bits={num_bits} must be 1 to {most} for ids of {ids.dtype}")
    return (ids[..., None] >> jnp.arange(num_bits, dtype=ids.dtype)) & 1


def affine_recode(ids: jax.Array, matrix: np.ndarray, offset: int | np.ndarray) -> jax.Array:
    """Ids with the binary code A c XOR b over GF(2), c being the code of an id (arXiv 2605.09751).

    Bit j of the result is parity(popcount(id AND row j of A)) XOR b_j.

    Args:
      ids: [...] integers below 2^K, K at most 31.
      matrix: A, [K, K] of {0, 1}; column k multiplies bit k of the id, row j gives bit j.
      offset: b, as an integer with b_j as its bit j, or as [K] bits.

    Returns:
      [...] integers below 2^K in the dtype of the ids; all distinct if A is invertible.
    """
    ids = jnp.asarray(ids)
    matrix = np.asarray(matrix)
    weights_K = 1 << np.arange(len(matrix))
    if np.ndim(offset):
        offset = int(np.asarray(offset) @ weights_K)
    # One row after the other: an axis of rows would be a [..., K] array before the sum.
    recoded = jnp.full_like(ids, offset)
    for j, mask in enumerate((matrix.astype(np.int64) @ weights_K).tolist()):
        recoded ^= (jax.lax.population_count(ids & mask) & 1) << j
    return recoded


def rank(matrix: np.ndarray) -> int:
    """Rank over GF(2) of [K, N] bits."""
    matrix = np.asarray(matrix)
    rows = (matrix.astype(object) @ [1 << j for j in range(matrix.shape[1])]).tolist()
    found = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            found += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return found


def draw_affine(seed: int, num_bits: int) -> tuple[np.ndarray, int]:
    """A uniformly drawn invertible A, uint8 [K, K], and offset b, an integer below 2^K.

    Uniform over GL(K, 2): bits are drawn until they have rank K, which they have with probability
    prod_{i=1..K} (1 - 2^-i), 0.288793 for K = 16. How the paper draws A and b is not confirmed.
    The same seed gives the same map on every machine.
    """
    rng = np.random.default_rng(seed)
    while True:
        matrix = rng.integers(0, 2, (num_bits, num_bits), dtype=np.uint8)
        if rank(matrix) == num_bits:
            return matrix, int(rng.integers(0, 1 << num_bits))


def invert_affine(matrix: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
    """The affine map that undoes (A, b): (A^-1, A^-1 b), by Gauss-Jordan over GF(2).

    Raises:
      ValueError: A is singular.
    """
    num_bits = len(matrix)
    bits_K = offset >> np.arange(num_bits) & 1
    rows = np.concatenate([matrix, np.eye(num_bits)], axis=1).astype(np.uint8)
    for k in range(num_bits):
        pivots = np.flatnonzero(rows[k:, k])
        if not len(pivots):
            raise ValueError("the matrix is singular over GF(2)")
        rows[[k, k + pivots[0]]] = rows[[k + pivots[0], k]]
        others = rows[:, k].astype(bool)
        others[k] = False
        rows[others] ^= rows[k]
    inverse = rows[:, num_bits:]
    return inverse, int((inverse @ bits_K % 2) @ (1 << np.arange(num_bits)))


def permute_ids(ids: jax.Array, num_bits: int, seed: int, *, inverse: bool = False) -> jax.Array:
    """A pseudo-random permutation of the integers below 2^num_bits, num_bits at most 32: uint32.

    A Feistel network: in turn, each half of the bits is XORed with a hash of the other half, so
    every round, and the whole, can be undone. A few operations an id and 8 constants.
    """
    low = num_bits // 2
    masks = np.uint32((1 << (num_bits - low)) - 1), np.uint32((1 << low) - 1)
    keys = np.random.default_rng(seed).integers(0, 1 << 32, _ROUNDS, dtype=np.uint32)
    ids = jnp.asarray(ids).astype(jnp.uint32)
    halves = [ids >> low, ids & masks[1]]
    for r in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        halves[r % 2] ^= _hash(halves[1 - r % 2] ^ keys[r]) & masks[r % 2]
    return halves[0] << low | halves[1]


def _hash(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of uint32 in which every bit depends on all."""
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    return x ^ x >> 16


class Code(NamedTuple):
    """A code of num_bits bits.

    Attributes:
      encode: ids [...] -> bits [..., K].
      decode: the first 32 bits of a code as integers [...] -> the ids with that code.
    """

    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def binary(num_bits: int, seed: int = 0) -> Code:
    """The bits of the id; those above ceil(log2 V) are always 0. The seed is not used."""
    return Code(lambda ids: token_codes(ids, num_bits), lambda words: words)


def affine(num_bits: int, seed: int = 0) -> Code:
    """The bits of the id under an invertible affine map drawn by `draw_affine`."""
    forward = draw_affine(seed, num_bits)
    backward = invert_affine(*forward)
    return Code(
        lambda ids: token_codes(affine_recode(ids, *forward), num_bits),
        lambda words: affine_recode(words, *backward),
    )


def random_codes(num_bits: int, seed: int = 0) -> Code:
    """Codes drawn at random without collisions, of any length from ceil(log2 V) up; no table.

    The first min(K, 32) bits are a pseudo-random permutation of the integers of that many bits, so
    no two ids share them; all further bits are hashes of these. Unlike `affine`, no bit is a linear
    function of the id's bits (from 4 bits up; every permutation of 2 bits is affine).
    """
    first = min(num_bits, _WORD)
    words = -(-(num_bits - first) // _WORD)
    keys = np.random.default_rng([seed, 1]).integers(0, 1 << 32, (2, words), dtype=np.uint32)

    def encode(ids):
        word = permute_ids(ids, first, seed)
        bits = token_codes(word, first)
        if words:
            more = _hash(_hash(word[..., None] ^ keys[0]) + keys[1])
            more = token_codes(more, _WORD).reshape(*word.shape, -1)[..., : num_bits - first]
            bits = jnp.concatenate([bits, more], axis=-1)
        return bits.astype(jnp.int32)

    def decode(words):
        return permute_ids(words, first, seed, inverse=True)

    return Code(encode, decode)


CODES = {"binary": binary, "affine": affine, "random_codes": random_codes}


def uniform_ids(code: Code, num_bits: int, vocab_size: int) -> list[int | None]:
    """The two ids below V with a code of zeros and a code of ones; None where there is no such id.

    Args:
      code: the code.
      num_bits: K.
      vocab_size: V.
    """
    found = []
    for bit in (0, 1):
        word = np.uint32(((1 << min(num_bits, _WORD)) - 1) * bit)
        candidate = int(code.decode(word))
        used = candidate < vocab_size and (np.asarray(code.encode(candidate)) == bit).all()
        found.append(candidate if used else None)
    return found


def sign_pattern(name: str, copies: int, seed: int = 0) -> np.ndarray | None:
    """One fixed sign for each copy of a code: "none", "alternate" (+ - + -) or "random"."""
    if name == "none":
        return None
    if name == "alternate":
        return 1 - 2 * (np.arange(copies) % 2)
    return 1 - 2 * np.random.default_rng([seed, 2]).integers(0, 2, copies)


def bit_values(codes: jax.Array, values: str, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Codes of {0, 1} as numbers: themselves ("zero_one") or 2 c - 1 ("plus_minus_one")."""
    zero, one = VALUES[values]
    return (codes * (one - zero) + zero).astype(dtype)


def lift(
    codes: jax.Array,
    width: int,
    *,
    values: str = "zero_one",
    layout: str = "tile",
    scale: float = 1.0,
    signs: np.ndarray | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Codes repeated to vectors [..., D]; no parameters, no gather.

    Copies of bit j stand at channels j, j + K, j + 2K... ("tile") or next to each other
    ("interleave"). Where K does not divide D, the first D mod K bits have one copy more: the last
    tile is cut. Either way each bit has the same copies, so the layouts, like any order of the
    bits, differ by a permutation of channels.

    Confirmed for arXiv 2605.09751: a code is repeated to the width, without a projection. Not
    confirmed: values, layout and scale. The defaults are our reading: values {0, 1} and no scale,
    as in the predecessor's 16-bit model, and the layout that its cards call "tiled" (that model
    itself interleaved). The mean square is then near 1/2, not 1.

    Args:
      codes: [..., K] of {0, 1}.
      width: D, at least K.
      values: "zero_one" or "plus_minus_one".
      layout: "tile" or "interleave".
      scale: factor on all.
      signs: one factor for each of the ceil(D / K) copies of a code, or None. Ours: with mixed
        signs no two codes lift to vectors that differ by a constant, which a LayerNorm would not
        see.
      dtype: of the result.

    Raises:
      ValueError: D < K, or another number of signs.
    """
    num_bits = codes.shape[-1]
    if width < num_bits:
        raise ValueError(f"a width of {width} cannot hold {num_bits} bits")
    copies, more = divmod(width, num_bits)
    x = bit_values(codes, values, dtype) * jnp.asarray(scale, dtype)

    def repeat(x, times):
        y = jnp.broadcast_to(x[..., None], (*x.shape, times))
        return y.reshape(*x.shape[:-1], -1)

    if layout == "tile":
        tiles = copies + (more > 0)
        y = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], tiles, num_bits))
        y = y.reshape(*x.shape[:-1], -1)[..., :width]
    elif layout == "interleave":
        y = repeat(x[..., more:], copies)
        if more:
            y = jnp.concatenate([repeat(x[..., :more], copies + 1), y], axis=-1)
    else:
        raise ValueError(f"layout={layout!r} is not tile or interleave")
    if signs is None:
        return y
    signs = np.asarray(signs)
    if signs.shape != (copies + (more > 0),):
        raise ValueError(f"{copies + (more > 0)} signs are needed, not {signs.shape}")
    if layout == "tile":
        channel_signs = np.repeat(signs, num_bits)[:width]
    else:
        channel_signs = [np.tile(signs, more), np.tile(signs[:copies], num_bits - more)]
        channel_signs = np.concatenate(channel_signs)
    return y * jnp.asarray(channel_signs, dtype)
