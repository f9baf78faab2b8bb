"""Documents with their words in random order: text with a known share of noise."""

import re
import zlib
from collections.abc import Sequence

import numpy as np

from lm.data.documents import Corpus, Document
from lm.data.hashing import fingerprint, held_out
from lm.errors import InputError


def corrupt(corpus: Corpus, share: float) -> Corpus:
    """The corpus with this share of its documents corrupted, chosen by a hash of their names.

    The words of a corrupted document, which is what stands between white space, change places at
    random; white space stays. Bytes, words and their frequencies are those of the document before,
    and hardly a word can be predicted from those before it. The order is drawn from the name: it is
    the same in every epoch and every run. Prompts stay as they are.

    Raises:
      InputError: a share outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"data.corrupted={share} must be between 0 and 1")
    if not share:
        return corpus
    digest = fingerprint([corpus.fingerprint.encode(), f"corrupted {share:g}".encode()])
    return corpus._replace(documents=_Corrupted(corpus.documents, share), fingerprint=digest)


def is_corrupted(name: str, share: float) -> bool:
    """Whether the document of this name is among the corrupted share."""
    # Not the hash of the name alone, which says what is held out.
    return held_out(b"corrupted " + name.encode("utf-8", "surrogateescape"), share)


class _Corrupted(Sequence):
    """Documents of which some are corrupted when they are read."""

    def __init__(self, documents: Sequence[Document], share: float):
        self._documents = documents
        self._share = share

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        document = self._documents[index]
        if not is_corrupted(document.name, self._share):
            return document
        rng = np.random.default_rng(zlib.crc32(document.name.encode("utf-8", "surrogateescape")))
        spans = tuple((_mix(text, rng) if w else text, w) for text, w in document.spans)
        return document._replace(spans=spans)


def _mix(text: str, rng: np.random.Generator) -> str:
    pieces = re.split(r"(\s+)", text)  # words at even places
    words = pieces[::2]
    pieces[::2] = [words[i] for i in rng.permutation(len(words))]
    return "".join(pieces)
