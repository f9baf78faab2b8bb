"""What is said about the data at the start of training."""

from collections.abc import Sequence

from lm.data.documents import Corpus


def describe_without_target(corpora: Sequence[Corpus]) -> str:
    """One line on documents in which no text is a target, "" where there are none.

    Such a document is empty, or all of its text has weight 0; of it only the end of text may be
    learned. Datasets of TFDS are not counted.
    """
    parts = [
        f"{corpus.without_target:,} of {len(corpus.documents):,} in {corpus.name}"
        for corpus in corpora
        if corpus.without_target
    ]
    return f"documents without a target: {', '.join(parts)}" if parts else ""
