"""Documents and rows that train nothing, because no token of them is a target."""

from collections.abc import Sequence
from typing import NamedTuple

from lm.data.documents import Corpus
from lm.data.layout import encode_document
from lm.data.tokenizers import Tokenizer

# Text that is looked at before the first step.
_MOST_CHARACTERS = 200_000


class WithoutTarget(NamedTuple):
    """Counts over the first documents of a split.

    Attributes:
      documents, rows: looked at; a row is a piece of one document, of at most T tokens.
      empty_documents, empty_rows: those of them without a target, a token of weight above 0.
    """

    documents: int
    rows: int
    empty_documents: int
    empty_rows: int

    def describe(self) -> str:
        """One line, "" where every row has a target."""
        if not self.empty_rows:
            return ""
        return (
            f"no target in {self.empty_rows:,} of {self.rows:,} rows, and in all of "
            f"{self.empty_documents:,} documents, of the first {self.documents:,}: their tokens "
            "have weight 0 and train nothing (a prompt longer than data.sequence_length?)"
        )


def count_without_target(
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    length: int,
    most_characters: int = _MOST_CHARACTERS,
) -> WithoutTarget:
    """Cuts the first documents of each corpus into rows of `length` tokens, and counts.

    At most `most_characters` are looked at, in equal shares of the corpora, so that the count takes
    no time on a large corpus.
    """
    documents = rows = empty_documents = empty_rows = 0
    for corpus in corpora:
        left = most_characters // len(corpora)
        for document in corpus.documents:
            left -= sum(len(text) for text, _ in document.spans)
            if left < 0:
                break
            weights = encode_document(document, tokenizer)["weights"]
            pieces = [weights[i : i + length].any() for i in range(0, len(weights), length)]
            documents, rows = documents + 1, rows + len(pieces)
            empty_documents += not any(pieces)
            empty_rows += len(pieces) - sum(map(bool, pieces))
    return WithoutTarget(documents, rows, empty_documents, empty_rows)
