"""Stable hashes: which documents are held out, and what a corpus is made of."""

import hashlib
from collections.abc import Iterable


def held_out(key: bytes, fraction: float) -> bool:
    """Returns whether the document of this key belongs to the validation split.

    The answer depends on the key alone: it is the same on every machine, in every order of
    documents, and a document that is held out at a fraction stays so at every larger one.
    """
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


class Fingerprint:
    """`fingerprint` of parts that come one after the other."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, part: bytes) -> None:
        """Adds the next part."""
        # The length first, or ("ab", "c") would be ("a", "bc").
        self._digest.update(len(part).to_bytes(8, "big"))
        self._digest.update(part)

    def hexadecimal(self) -> str:
        """Returns the 32 digits of the parts so far."""
        return self._digest.hexdigest()


def fingerprint(parts: Iterable[bytes]) -> str:
    """Returns 32 hexadecimal digits that tell one sequence of byte strings from another."""
    digest = Fingerprint()
    for part in parts:
        digest.add(part)
    return digest.hexadecimal()
