"""Where two tokenizations of one document meet, by the bytes that their tokens cover."""

import numpy as np

from lm.data.tokenizers import Subwords, Tokenizer

# How vocabularies spell a space, a line break and a tab at the beginning of a token: as they are,
# by GPT-2's table of bytes, and by SentencePiece.
_SPACES = " \n\t\u0120\u010a\u0109\u2581"


def common_ends(own_bytes: np.ndarray, other_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last positions before every byte boundary that both tokenizations have.

    A boundary is where a token ends and the next one begins; tokens that cover no bytes, such as
    the second half of a character, belong to what is before them. The end of text is one more, so
    that the pieces between boundaries are all of both documents.

    Args:
      own_bytes, other_bytes: bytes of every target of the document, each with the end of text,
        which covers none, as `lm.data.layout.encode_document` gives them for text that is not
        framed.

    Returns:
      Positions in each, int64 [boundaries], both rising. None where the tokenizations do not cover
      the same number of bytes, as of a tokenizer that drops text.
    """
    if own_bytes.sum() != other_bytes.sum():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    (own, own_places), (other, other_places) = map(_boundaries, (own_bytes, other_bytes))
    _, first, second = np.intersect1d(own, other, assume_unique=True, return_indices=True)
    return (
        np.append(own_places[first], len(own_bytes) - 1),
        np.append(other_places[second], len(other_bytes) - 1),
    )


def chunk_sums(values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], length: int) -> np.ndarray:
    """Sums of the other's values over each piece, at the own position where it ends.

    Args:
      values: float [positions of the other].
      ends: own and other, of `common_ends`.
      length: own positions.

    Returns:
      float32 [length], NaN where no piece ends.
    """
    own, other = ends
    found = np.full(length, np.nan, np.float32)
    before = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    found[own] = np.diff(before[other + 1], prepend=0.0)
    return found


def at_starts(values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], length: int) -> np.ndarray:
    """The other's values where it has read the same text as the own tokenization, and whole tokens.

    Args:
      values: float [positions of the other, ...].
      ends: own and other, of `common_ends`.
      length: own positions.

    Returns:
      float32 [length, ...], NaN where no own target begins on a common boundary.
    """
    found = np.full((length, *values.shape[1:]), np.nan, np.float32)
    if len(ends[0]):
        own, other = (np.append(0, places[:-1] + 1) for places in ends)
        found[own] = values[other]
    return found


def spaces(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens begin with a space, a line break or a tab, or are special: bool [V]."""
    found = np.zeros(tokenizer.vocab_size, bool)
    found[[tokenizer.beginning_of_text, tokenizer.end_of_text]] = True
    if isinstance(tokenizer, Subwords):
        special = tokenizer.special_tokens
        entries = tokenizer.vocabulary().items()
        found[[i for token, i in entries if token[:1] in [*_SPACES] or token in special]] = True
    else:
        found[[ord(space) for space in " \n\t"]] = True
    return found


def _boundaries(num_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes up to every boundary of the text, and the last position before it."""
    after = np.cumsum(num_bytes[:-1], dtype=np.int64)
    last = np.append(after[1:] != after[:-1], True)[: len(after)] & (after > 0)
    return after[last], np.flatnonzero(last)
