"""Chats: messages of several turns as one text, of which only the answers are trained on.

The tokenizer's chat template puts its special tokens around the messages. No text becomes one: what
a message says is marked with a character that occurs nowhere else while the template works on it.
"""

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from lm.data.documents import SpecialToken
from lm.data.templates import CHATML, ChatTemplate, Message, make_template
from lm.errors import InputError, shown

__all__ = ["CHATML", "ROLES", "ChatTemplate", "Message", "make_template", "read_messages", "spans"]

ROLES = ("system", "user", "assistant", "tool")

# Fields of a message that would be lost, because templates are given its role and content only.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

_PRIVATE_USE = range(0xE000, 0xF900)


def read_messages(messages: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the roles and the contents of a list of messages.

    Args:
      messages: the field of a record: objects with a role and a content, which is a string, or a
        list of parts {"type": "text", "text": ...}, which are joined.
      where: the file and line, which errors open with.

    Raises:
      InputError: it is no such list, or has no message of the assistant.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a list of at least one message")
    roles, contents = read_turns(messages, where)
    if "assistant" not in roles:
        raise InputError(f"{where}: messages have none of the assistant, so nothing to train on")
    return roles, contents


def read_turns(messages: list[Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the roles and the contents of messages of any roles; see `read_messages`."""
    roles, contents = [], []
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{here} must be an object, got {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(
                f"{here} has the role {shown(repr(role))}; valid are {', '.join(ROLES)}"
            )
        for key in _UNSUPPORTED:
            if message.get(key):
                raise InputError(f"{here} has {key}, which is not read; only its content is")
        roles.append(role)
        contents.append(_content(message.get("content"), here))
    return tuple(roles), tuple(contents)


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise InputError(f"{where} must have a string as its content, got {kind}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where} has a part of type {kind!r}; only text can be read")
    return "".join(part["text"] for part in content)


def spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    special_tokens: Collection[str],
    where: str,
    weights: Sequence[float] | None = None,
) -> tuple[tuple[str, float], ...]:
    """Returns the text of a chat with the weights of its tokens as targets.

    An answer is what follows the text that opens it, up to and with the special token that ends
    its turn, or to the end of its turn where none does. It has weight 1, all else weight 0.

    Args:
      template: of the tokenizer.
      messages: at least one.
      special_tokens: of the tokenizer; of one character, they are text here.
      where: the document, which errors open with.
      weights: one a message; an answer of weight 0 is no target. None is 1 for every answer.

    Returns:
      Spans, none of them empty. Special tokens that the template wrote are `SpecialToken`s.

    Raises:
      InputError: the template cannot render the messages, or writes an answer in another way when
        there are more messages after it, so that it cannot be told from the rest.
    """
    names = frozenset(name for name in (*special_tokens, *template.markers) if len(name) > 1)
    special = _compile(names)
    mark, probe = _unused(messages, names, where)
    marked = [m._replace(content=_guarded(m.content, special, mark)) for m in messages]
    try:
        full = template.render(marked)
        wanted = [
            message.role == "assistant" and (weights is None or weights[i] != 0)
            for i, message in enumerate(messages)
        ]
        ranges = list(_answers(template, marked, wanted, full, special.found, probe))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    found, start = [], 0
    for begin, end in ranges:
        found += [(full[start:begin], 0.0), (full[begin:end], 1.0)]
        start = end
    found.append((full[start:], 0.0))
    return _split(found, special.found, special_tokens, mark)


def prompt_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    special_tokens: Collection[str],
    where: str,
) -> tuple[tuple[str, float], ...]:
    """Returns the text of a chat up to where the next answer begins, in spans of weight 0.

    Arguments and errors are those of `spans`.
    """
    names = frozenset(name for name in (*special_tokens, *template.markers) if len(name) > 1)
    special = _compile(names)
    mark, _ = _unused(messages, names, where)
    marked = [m._replace(content=_guarded(m.content, special, mark)) for m in messages]
    try:
        text = template.render(marked, add_generation_prompt=True)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return _split([(text, 0.0)], special.found, special_tokens, mark)


def end_of_turn(template: ChatTemplate, special_tokens: Collection[str]) -> str:
    """Returns the token that ends an answer, a `SpecialToken`, or the marker that is text.

    "" where the template ends answers with neither.
    """
    asked = [Message("user", "a"), Message("assistant", "b")]
    last = [text for text, weight in spans(template, asked, special_tokens, "chat") if weight][-1]
    if isinstance(last, SpecialToken):
        return last
    return next((marker for marker in template.markers if last.endswith(marker)), "")


def _unused(messages: Sequence[Message], names: Collection[str], where: str) -> tuple[str, str]:
    """Two private-use characters that occur in none of the messages and names."""
    used = set().union(*(message.content for message in messages), *names)
    # Two are enough: a list of all takes longer than everything else that is done with a chat.
    free = list(itertools.islice((c for c in map(chr, _PRIVATE_USE) if c not in used), 2))
    if len(free) > 1:
        return free[0], free[1]
    raise InputError(f"{where}: its messages have every character for private use, U+E000 to F8FF")


class _Names(NamedTuple):
    """Texts of special tokens: `found` finds them, the longest of those that begin together.

    `starts` finds where any of them begins, also inside another; `heads` and `tails` are what one
    may begin and end with.
    """

    found: re.Pattern[str]
    starts: re.Pattern[str]
    heads: tuple[str, ...]
    tails: tuple[str, ...]


@functools.lru_cache(maxsize=16)
def _compile(names: frozenset[str]) -> _Names:
    ordered = sorted(names, key=lambda name: (-len(name), name))
    pattern = "|".join(map(re.escape, ordered)) or r"(?!)"
    heads = {name[:i] for name in names for i in range(1, len(name))}
    tails = {name[i:] for name in names for i in range(1, len(name))}
    return _Names(re.compile(pattern), re.compile(f"(?={pattern})"), tuple(heads), tuple(tails))


def _guarded(content: str, names: _Names, mark: str) -> str:
    """The content with a mark in every special token that it spells, or might spell in part.

    The mark stands after the first character, where no template looks that trims white space.
    """
    places = {match.start() + 1 for match in names.starts.finditer(content)}
    # The template's text beside the content could complete a token.
    first, last = len(content) - len(content.lstrip()), len(content.rstrip())
    if first < last:
        if content.startswith(names.tails, first):
            places.add(first)
        if content.endswith(names.heads, 0, last):
            places.add(last)
    cuts = [0, *sorted(places), len(content)]
    return mark.join(content[a:b] for a, b in itertools.pairwise(cuts))


def _answers(
    template: ChatTemplate,
    messages: Sequence[Message],
    wanted: Sequence[bool],
    full: str,
    special: re.Pattern[str],
    probe: str,
) -> Iterator[tuple[int, int]]:
    """Yields where in `full` each wanted answer begins and ends, end of turn included."""
    least = 0
    for i in itertools.compress(range(len(messages)), wanted):
        here = f"chat template: message {i + 1}, of the assistant,"
        plain = template.render(messages[:i]) if i else ""
        opened = template.render(messages[:i], add_generation_prompt=True) if i else ""
        # Without a text that opens an answer, or with one that an answer in a chat does not have,
        # the turn begins with its own header.
        has_header = opened == plain or not full.startswith(opened)
        before = plain if has_header else opened
        if not full.startswith(before):
            raise InputError(f"{here} changes the text of the messages before it")
        through = template.render(messages[: i + 1])
        if not through.startswith(before):
            raise InputError(f"{here} changes the text of the messages before it")
        turn = through[len(before) :]
        end, closing = _end_of_turn(turn, special)
        if not full.startswith(through):
            # Some templates leave the thinking out of all answers but the last.
            turn = full[len(before) :]
            end = _same_end(turn, closing, special, has_header)
            if end is None:
                raise InputError(f"{here} is written in another way when more messages follow")
        try:
            header = _header(template, before, messages[: i + 1], probe) if has_header else ""
        except InputError as error:
            raise InputError(f"{here} {error}") from None
        begin = len(before) + len(header)
        if not turn[: end - len(closing)].startswith(header) or begin < least:
            raise InputError(f"{here} has no place of its own in the text")
        least = len(before) + end
        yield begin, least


def _end_of_turn(turn: str, special: re.Pattern[str]) -> tuple[int, str]:
    """Where a turn ends, and the special token that ends it, "" where none does."""
    found = list(special.finditer(turn))
    if found and not turn[found[-1].end() :].strip():
        return found[-1].end(), found[-1].group()
    return len(turn), ""


def _same_end(rest: str, closing: str, special: re.Pattern[str], has_header: bool) -> int | None:
    """Where the first turn of `rest` ends, if it is clear that it ends with the same token."""
    found = special.search(rest)
    if has_header or not closing or not found or found.group() != closing:
        return None
    return found.end()


def _header(template: ChatTemplate, before: str, messages: Sequence[Message], probe: str) -> str:
    """What a turn writes before the content of its message, the last; "" if it is white space.

    An answer that says nothing but `probe` shows it, whatever the template does with white space.
    """
    shown = template.render([*messages[:-1], messages[-1]._replace(content=probe)])
    found = shown.find(probe, len(before))
    if not shown.startswith(before) or found < 0:
        raise InputError("changes what it says so much that it cannot be found")
    header = shown[len(before) : found]
    return header if header.strip() else ""


def _split(
    found: Sequence[tuple[str, float]],
    special: re.Pattern[str],
    special_tokens: Collection[str],
    mark: str,
) -> tuple[tuple[str, float], ...]:
    """Spans with the special tokens by themselves, without the marks; no two could be one."""
    joined: list[tuple[str, float]] = []
    for text, weight in found:
        start = 0
        for match in special.finditer(text):
            pieces = [text[start : match.start()], match.group()]
            if match.group() in special_tokens:
                pieces[1] = SpecialToken(match.group())
            joined += [(piece, weight) for piece in pieces]
            start = match.end()
        joined.append((text[start:], weight))
    merged: list[tuple[str, float]] = []
    for text, weight in joined:
        if isinstance(text, SpecialToken):
            merged.append((text, weight))
        elif clean := text.replace(mark, ""):
            if merged and merged[-1][1] == weight and not isinstance(merged[-1][0], SpecialToken):
                clean = merged.pop()[0] + clean
            merged.append((clean, weight))
    return tuple(merged)
