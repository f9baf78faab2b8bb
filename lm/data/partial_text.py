"""Text from tokens that come one after the other."""

import numpy as np

from lm.data.tokenizers import Tokenizer

# Decoders write this character for bytes that are not, or not yet, those of a character.
_REPLACEMENT = "\ufffd"


class PartialText:
    """Decodes a growing list of tokens; no piece of its text is ever taken back.

    The pieces, joined, are `tokenizer.decode` of all tokens. If the bytes of a
    character are spread over several tokens, the piece of the last one has it.

    Args:
      tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._given = ""

    def extend(self, ids: np.ndarray, last: bool) -> str:
        """Returns the text of the tokens that has not been returned before.

        Args:
          ids: all tokens so far, int32 [tokens].
          last: whether there are no more; nothing is held back then.
        """
        text = self._tokenizer.decode(ids)
        if not last:
            if len(ids) and self._tokenizer.is_byte(int(ids[-1])):
                return ""
            text = text.rstrip(_REPLACEMENT)
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
