"""What a document and a corpus are, and how raw bytes become one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import InputError, shown


class SpecialToken(str):
    """The text of a span that is encoded as the one special token of this name."""

    __slots__ = ()


class Document(NamedTuple):
    """One text, in spans.

    Attributes:
      name: a stable id, unique in its corpus.
      spans: pairs of a text and the weight of its tokens as targets. Plain text is one span of
        weight 1; a prompt has weight 0 and its response weight 1. The spans of a chat are the
        contents of its messages, those of the assistant with weight 1.
      roles: of a chat, who says each of its spans; `lm.data.layout.rendered` puts the chat template
        of a tokenizer around them. () for all other text.
      framed: the spans hold the first and the last token already, so that no beginning or end of
        text is added.
      rejected: of a pair, whose chosen answer is in `spans`: the same prompt with the rejected one.
      label: of a labelled answer, whether it is desirable; None for all others.
      record: of a problem, all that is known of it, as JSON values: `prompt` (a text or a list of
        messages), `answer` (a text) and whatever else its source has; None for all others. As text
        a problem is its prompt, weight 0, and its answer, weight 1.
    """

    name: str
    spans: tuple[tuple[str, float], ...]
    roles: tuple[str, ...] = ()
    framed: bool = False
    rejected: "Document | None" = None
    label: bool | None = None
    record: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """All spans as one text; of a pair, that with the chosen answer."""
        return "".join(text for text, _ in self.spans)

    @property
    def answers(self) -> tuple["Document", ...]:
        """The chosen and the rejected answer of a pair, each with its prompt; else itself."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def kind(self) -> str:
        """ "pairs" of answers, "labelled" answers, "problems", or ordinary "text"."""
        if self.rejected is not None:
            return "pairs"
        if self.label is not None:
            return "labelled"
        return "text" if self.record is None else "problems"


class Corpus(NamedTuple):
    """One split of one corpus.

    Attributes:
      name: as it was written in the config.
      documents: `len` and `[index]` give `Document`s. It can be pickled, and opens files when
        they are needed.
      fingerprint: tells this split's content from any other.
      replaced: documents that are not valid UTF-8, whose bad bytes read as U+FFFD; not counted
        for datasets of TFDS.
      kind: of its documents, all the same: "text", "problems", "pairs" or "labelled".
    """

    name: str
    documents: Sequence[Document]
    fingerprint: str
    replaced: int
    kind: str = "text"

    @property
    def preferences(self) -> bool:
        """Whether its documents are answers that somebody has preferred, not text to be learned."""
        return self.kind in ("pairs", "labelled")


def decode(content: bytes) -> tuple[str, bool]:
    """Returns the text, and whether bytes that are not UTF-8 had to be replaced."""
    try:
        return content.decode(), False
    except UnicodeDecodeError:
        return content.decode(errors="replace"), True


def span_fields(
    available: Collection[str], where: str, others: str = ""
) -> tuple[tuple[str, float], ...]:
    """Returns the fields of a record that make up its document, each with its weight.

    Args:
      available: the fields that the record has.
      where: what the message of an error opens with.
      others: what the caller takes besides, for that message.

    Raises:
      InputError: there is neither `text` nor `prompt` and `response`.
    """
    if "text" in available:
        return (("text", 1.0),)
    if "prompt" in available and "response" in available:
        return (("prompt", 0.0), ("response", 1.0))
    found = shown(", ".join(sorted(available)), 300) or "nothing"
    raise InputError(f"{where}: needs text, or prompt and response{others}; it has {found}")
