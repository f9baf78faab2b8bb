"""Problems: a prompt and the answer that is right, with whatever else a reward wants to know.

Ordinary training reads a problem as text, the prompt with weight 0 and the answer with weight 1. A
policy gradient samples answers of its own to the prompt, and a reward judges them by the record.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm import strict_json
from lm.data.chats import read_turns
from lm.data.documents import Corpus, Document
from lm.errors import InputError, shown


class Problem(NamedTuple):
    """One problem.

    Attributes:
      name: of its document, unique in its corpus.
      document: the prompt, weight 0, and the right answer, weight 1, which is its last span.
      record: `prompt` (a text or a list of messages), `answer` (a text), and all other values of a
        line of JSON, or what a made task adds.
    """

    name: str
    document: Document
    record: Mapping[str, Any]


def problems(corpora: Sequence[Corpus]) -> Sequence[Problem]:
    """The problems of all corpora, one after the other, each read when it is asked for.

    Raises:
      InputError: a corpus has none.
    """
    for corpus in corpora:
        if corpus.kind != "problems":
            raise InputError(
                f"data.corpus {corpus.name!r} has no problems to solve but records of the kind "
                f"{corpus.kind}; valid: JSON lines with prompt and answer, or task:NAME"
            )
    return _Problems(corpora)


class _Problems(Sequence):
    def __init__(self, corpora: Sequence[Corpus]):
        self._documents = [corpus.documents for corpus in corpora]
        self._ends = list(itertools.accumulate(map(len, self._documents)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(index)  # Which ends iteration.
        corpus = bisect.bisect_right(self._ends, index)
        first = self._ends[corpus - 1] if corpus else 0
        document = self._documents[corpus][index - first]
        return Problem(document.name, document, document.record)


def is_problem(record: Mapping[str, Any]) -> bool:
    """Whether a record is a problem: it has a prompt and an answer, and is no ordinary text."""
    ordinary = {"text", "messages", "response"} & set(record)
    return not ordinary and {"prompt", "answer"} <= set(record)


def read_problem(record: Mapping[str, Any], name: str, where: str) -> Document:
    """The document of a record with `prompt`, a text or a list of messages, and `answer`.

    The answer is a text or a number, which is taken as its text.

    Args:
      record: for which `is_problem` is true, and `lm.data.preferences.is_preference` is not.
      name: of the document.
      where: the file and line, which errors open with.

    Raises:
      InputError: the prompt is empty, or one of the two is of another type.
    """
    prompt, answer = record["prompt"], record["answer"]
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if number and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str):
        found = shown(repr(answer), 50)
        raise InputError(f"{where}: answer must be a text or a number, got {found}")
    if not isinstance(prompt, str | list):
        kind = type(prompt).__name__
        raise InputError(f"{where}: prompt must be a text or a list of messages, got {kind}")
    if not prompt:
        raise InputError(f"{where}: prompt is empty; it must have text or a message")
    roles, contents = (), (prompt,)
    if isinstance(prompt, list):
        roles, contents = read_turns(prompt, f"{where}: prompt")
        roles = (*roles, "assistant")
    spans = (*((text, 0.0) for text in contents), (answer, 1.0))
    return Document(name, spans, roles, record={**record, "answer": answer})


def key_of(document: Document) -> bytes:
    """What decides whether a problem is held out: its prompt, whatever the answer."""
    prompt = document.record["prompt"]
    text = prompt if isinstance(prompt, str) else strict_json.dumps(prompt, sort_keys=True)
    return text.encode("utf-8", "backslashreplace")
