"""Records of answers that somebody has preferred: pairs of two, or one with a label."""

from collections.abc import Mapping
from typing import Any

from lm.data.chats import read_turns
from lm.data.documents import Document
from lm.errors import InputError, shown

PAIR = ("chosen", "rejected")
LABELLED = ("completion", "label")

# (roles, contents, weights) of some messages; roles are () where they are one text.
_Turns = tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]


def is_preference(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of preference data: no ordinary text, and with one of its fields."""
    ordinary = "text" in record or "messages" in record or {"prompt", "response"} <= set(record)
    return not ordinary and any(name in record for name in (*PAIR, "completion"))


def read_preference(record: Mapping[str, Any], name: str, where: str) -> Document:
    """The document of a pair (`prompt`, `chosen`, `rejected`) or of a labelled answer (`prompt`,
    `completion`, `label`).

    Prompt and answers are texts, or all of them lists of messages. `chosen` and `rejected` without
    `prompt` are whole conversations: what they share at their beginning is the prompt. An answer
    begins with a message of the assistant. Tokens of answers have weight 1, those of prompts 0,
    also of answers of the assistant in them.

    Args:
      record: for which `is_preference` is true.
      name: of the document.
      where: the file and line, which errors open with.

    Raises:
      InputError: a field is missing, of the wrong type or empty, or of both kinds.
    """
    pair = [field for field in PAIR if field in record]
    labelled = [field for field in LABELLED if field in record]
    if pair and "completion" in record:
        raise InputError(
            f"{where}: has {' and '.join(pair)} and completion; valid: prompt, chosen and rejected "
            "of a pair, or prompt, completion and label of one answer"
        )
    for fields, found in ((PAIR, pair), (LABELLED, labelled)):
        missing = [field for field in fields if field not in found]
        if (fields == PAIR) == bool(pair) and missing:
            raise InputError(f"{where}: has {found[0]}, but no {' and no '.join(missing)}")
    if not pair:
        label = record["label"]
        if not isinstance(label, bool):
            raise InputError(f"{where}: label must be true or false, got {shown(repr(label), 50)}")
        prompt, completion = _turns(record, ("prompt", "completion"), where)
        return _document(name, prompt, completion, where, "completion")._replace(label=label)
    if "prompt" in record:
        prompt, chosen, rejected = _turns(record, ("prompt", *PAIR), where)
    else:
        prompt, chosen, rejected = _shared(*_turns(record, PAIR, where), where)
    other = _document(name, prompt, rejected, where, "rejected")
    return _document(name, prompt, chosen, where, "chosen")._replace(rejected=other)


def prompt_of(document: Document) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The roles and the contents of the prompt of an answer."""
    size = _prompt_size(document)
    return document.roles[:size], tuple(text for text, _ in document.spans[:size])


def with_answer_of(document: Document, other: Document) -> Document | None:
    """The prompt of one document with the answer of another; None where one is no chat."""
    if bool(document.roles) != bool(other.roles):
        return None
    here, there = _prompt_size(document), _prompt_size(other)
    return Document(
        f"{document.name} with the answer of {other.name}",
        document.spans[:here] + other.spans[there:],
        document.roles[:here] + other.roles[there:],
    )


def _prompt_size(document: Document) -> int:
    # Every answer begins with a span of weight 1.
    return next(i for i, (_, weight) in enumerate(document.spans) if weight)


def _turns(record: Mapping[str, Any], fields: tuple[str, ...], where: str) -> list[_Turns]:
    found = []
    for field in fields:
        if field not in record:
            names = shown(", ".join(sorted(record)), 300)
            raise InputError(f"{where}: needs {field}; it has {names}")
        value = record[field]
        if isinstance(value, str):
            found.append(((), (value,), (0.0,)))
        elif not isinstance(value, list):
            kind = type(value).__name__
            raise InputError(f"{where}: {field} must be a text or a list of messages, got {kind}")
        elif not value:
            raise InputError(f"{where}: {field} is an empty list; it must have a message")
        else:
            roles, contents = read_turns(value, f"{where}: {field}")
            found.append((roles, contents, tuple(float(role == "assistant") for role in roles)))
    if len({bool(roles) for roles, *_ in found}) > 1:
        kinds = (f"{f} a {'list' if t[0] else 'text'}" for f, t in zip(fields, found, strict=True))
        raise InputError(f"{where}: {', '.join(kinds)}; valid: all texts, or all lists of messages")
    return found


def _shared(chosen: _Turns, rejected: _Turns, where: str) -> tuple[_Turns, _Turns, _Turns]:
    """(prompt, chosen, rejected) of two whole conversations, each with an answer left to it."""
    if not chosen[0]:
        raise InputError(
            f"{where}: needs prompt; only chosen and rejected that are lists of messages can be "
            "without"
        )
    size = 0
    most = min(len(chosen[0]), len(rejected[0])) - 1
    while size < most and all(chosen[i][size] == rejected[i][size] for i in (0, 1)):
        size += 1
    if not size:
        raise InputError(f"{where}: chosen and rejected share no message at their beginning")
    prompt, *answers = (
        tuple(part[cut] for part in turns)
        for turns, cut in (
            (chosen, slice(0, size)),
            (chosen, slice(size, None)),
            (rejected, slice(size, None)),
        )
    )
    return prompt, *answers


def _document(name: str, prompt: _Turns, answer: _Turns, where: str, field: str) -> Document:
    roles, contents, weights = answer
    if roles and roles[0] != "assistant":
        raise InputError(f"{where}: {field} must begin with a message of the assistant")
    spans = [(text, 0.0) for text in prompt[1]]
    spans += zip(contents, weights if roles else (1.0,), strict=True)
    return Document(name, tuple(spans), prompt[0] + roles)
