"""Encodes contexts and continuations into tokens to score.

Of a context and its continuation both are encoded together, and cut where the encoding of the
context alone ends; spaces at the end of the context belong to the continuation. That is the rule of
lm_eval 0.4.13 (`TemplateLM._encode_pair`).
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lm.data.tokenizers import Subwords, Tokenizer
from lm.errors import InputError, shown


class Ids(NamedTuple):
    """Tokens [n] int32, of which the last `scored` are to be predicted from those before them."""

    tokens: np.ndarray
    scored: int


class Encoder:
    """Encodes for one model.

    Args:
      tokenizer: of the model.
      opens: whether the beginning of text opens every prompt, as it opens every document of a
        training of this repository; otherwise it stands only where there is nothing else.
      length: tokens that the model reads at most.
      vocabulary: rows of its table.

    Attributes:
      special: name -> id of the special tokens that are read where a text has their names. There
        are none, unless a chat template has written the texts: see `read_chats`.
    """

    def __init__(self, tokenizer: Tokenizer, opens: bool, length: int, vocabulary: int):
        self.tokenizer, self.length = tokenizer, length
        self._opens, self._vocabulary = opens, vocabulary
        self.special: dict[str, int] = {}

    def read_chats(self) -> None:
        """From now on texts come from a chat template: special tokens are read by their names.

        A text that begins with one is not opened by the beginning of text.
        """
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        self.special = {name: self.tokenizer.special_id(name) for name in names}

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text alone.

        Raises:
          InputError: the tokenizer gives an id that the model has no row for.
        """
        pieces = [text]
        if self.special:
            pieces = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
        parts = [
            [self.special[piece]] if i % 2 else self.tokenizer.encode(piece)[0]
            for i, piece in enumerate(pieces)
        ]
        ids = np.concatenate(parts).astype(np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocabulary:
            raise InputError(
                f"the tokenizer gives ids from {ids.min()} to {ids.max()} for {shown(text)}; the "
                f"model has a table of {self._vocabulary}"
            )
        return ids

    def about(self) -> dict[str, Any]:
        """What decides how texts are encoded, for a report."""
        beginning = "always" if self._opens else "empty"
        return {"beginning": beginning, "length": self.length}

    def prompt(self, text: str) -> np.ndarray:
        """The ids that a continuation of the text follows, at least one."""
        return self._opened(self.encode(text))

    def pair(self, context: str, continuation: str) -> Ids:
        """The ids of both; of a pair that is too long, the last `length` + 1.

        Raises:
          InputError: nothing is left to predict.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before, whole = self.encode(kept), self.encode(kept + continuation)
        scored = len(whole) - len(before)
        if scored < 1:
            raise InputError(
                f"{shown(continuation)} has no tokens of its own after {shown(kept[-60:])}"
            )
        if scored > self.length:
            raise InputError(
                f"{shown(continuation)} has {scored:,} tokens; the model reads {self.length:,}"
            )
        return Ids(self._opened(whole, scored)[-self.length - 1 :], scored)

    def is_cut(self, context: str, continuation: str) -> bool:
        """Whether `pair` leaves tokens out."""
        return len(self._opened(self.encode(context + continuation))) > self.length + 1

    def windows(self, text: str, stride: int = 0) -> Iterator[Ids]:
        """Windows over a long text, in which every token is predicted once.

        The first predicts `length` tokens, the first of them from the beginning of text; each
        later one the next `stride` tokens, from the `length` - `stride` + 1 before them and from
        each other. A stride of 0 is the length: lm_eval's windows, with one token of context.

        Raises:
          InputError: a stride above the length.
        """
        if stride > self.length:
            raise InputError(
                f"metadata.stride={stride} is more than the {self.length} tokens that the model "
                "reads"
            )
        tokens = np.concatenate([[self.tokenizer.beginning_of_text], self.encode(text)])
        tokens, size = tokens.astype(np.int32), self.length + 1
        if len(tokens) > 1:
            yield Ids(tokens[:size], min(size, len(tokens)) - 1)
        end, step = size, stride or self.length
        while end < len(tokens):
            next_end = min(end + step, len(tokens))
            yield Ids(tokens[next_end - size : next_end], next_end - end)
            end = next_end

    def _opened(self, ids: np.ndarray, scored: int = 0) -> np.ndarray:
        special = len(ids) > 0 and ids[0] in self.special.values()
        if (self._opens and not special) or len(ids) == scored:
            ids = np.concatenate([[self.tokenizer.beginning_of_text], ids])
        return ids.astype(np.int32)


def adds_beginning(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.json says that text begins with the beginning of text."""
    if not isinstance(tokenizer, Subwords):
        return True
    import tokenizers

    ids = tokenizers.Tokenizer.from_str(tokenizer.definition).encode("a").ids
    return ids[:1] == [tokenizer.beginning_of_text]
