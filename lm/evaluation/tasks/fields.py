"""What a task takes from a document: the value of a field, or a Jinja template of them.

As lm_eval 0.4.13 does: a name that is a field gives its value as it is, any other string is a
template. Templates run in the bounded sandbox of `lm.data.templates`.
"""

import ast
import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from lm.data.templates import Sandbox
from lm.errors import InputError, shown
from lm.evaluation.tasks.time_limit import limited

# Characters of a list that a template writes.
_MOST_LITERAL = 1_000_000

Document = Mapping[str, Any]


class Reader:
    """Reads documents by the doc_to_* keys of a task; bad documents and templates are InputErrors.

    Args:
      where: the task's file, which messages begin with.
      text, target, choice: doc_to_text, doc_to_target, doc_to_choice; None where there is none.
    """

    def __init__(self, where: str, text: Any, target: Any, choice: Any):
        self._where, self._text, self._target, self._choice = where, text, target, choice

    @property
    def has_choices(self) -> bool:
        """Whether there is a doc_to_choice."""
        return self._choice is not None

    def text(self, document: Document) -> str | int:
        """The question; a number is the index of the choice that is right as a context."""
        value = self._value("doc_to_text", self._text, document)
        if isinstance(value, str | int):
            return value
        raise self._refusal("doc_to_text", document, value, "a string")

    def target(self, document: Document) -> str | int | list[Any]:
        """The answer: a text, the index of a choice, or several of either."""
        if isinstance(self._target, list):
            return self._target
        value = self._value("doc_to_target", self._target, document)
        rendered = self._target not in document if isinstance(self._target, str) else False
        if rendered and isinstance(value, str) and value[:1] + value[-1:] == "[]":
            value = self._literal(value, "doc_to_target", fallback=value)
        if isinstance(value, float):
            value = str(value)
        if isinstance(value, str | int | list):
            return value
        raise self._refusal("doc_to_target", document, value, "a string, an index or a list")

    def choices(self, document: Document) -> list[str]:
        """The texts to choose from."""
        given = self._choice
        if isinstance(given, str) and given in document:
            given = document[given]
        elif isinstance(given, str):
            given = self._literal(self.rendered("doc_to_choice", given, document), "doc_to_choice")
        elif isinstance(given, dict):
            given = list(given.values())
        ok = isinstance(given, list) and given and all(isinstance(x, str) and x for x in given)
        if not ok:
            raise self._refusal("doc_to_choice", document, given, "a list of strings, none empty")
        return given

    def resolved(self, key: str, template: str | None, document: Document) -> str:
        """A field or a template of another key, such as description; "" for none."""
        if not template:
            return ""
        value = document.get(template)
        return value if isinstance(value, str) else self.rendered(key, template, document)

    def rendered(self, key: str, template: str, document: Document) -> str:
        """The text that a template makes of a document."""
        given = sum(len(value) for value in document.values() if isinstance(value, str))
        try:
            with limited(f"{self._where}: {key}"):
                return _sandbox().write(_compiled(template), document, given)
        except InputError:
            raise
        except Exception as error:  # A template may raise anything.
            raise InputError(f"{self._where}: {key}: {shown(str(error))}") from None

    def _value(self, key: str, given: Any, document: Document) -> Any:
        """A field, or a template; digits are an index where there are choices."""
        if isinstance(given, int):
            return given
        if not isinstance(given, str):
            raise InputError(f"{self._where}: {key}: must be the name of a field or a template")
        if given in document:
            return document[given]
        text = self.rendered(key, given, document)
        is_index = text.isascii() and text.isdigit() and len(text) < 10
        return int(text) if is_index and self.has_choices else text

    def _literal(self, text: str, key: str, fallback: Any = None) -> Any:
        """The Python literal that a template has written; nothing is executed."""
        try:
            if len(text) > _MOST_LITERAL:
                raise ValueError
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            if fallback is not None:
                return fallback
            raise InputError(
                f"{self._where}: {key}: {shown(text)} is no list; valid: the name of a field, a "
                "list, or a template such as {{[one, other]}}"
            ) from None

    def _refusal(self, key: str, document: Document, value: Any, valid: str) -> InputError:
        return InputError(
            f"{self._where}: {key} gives {shown(value)} for {shown(dict(document), 60)}; "
            f"valid: {valid}"
        )


@functools.cache
def _sandbox() -> Sandbox:
    made = Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    made.add_filter("regex_replace", _regex_replace)
    return made


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _sandbox().from_string(template)


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """The filter that lm_eval adds to Jinja."""
    return re.sub(pattern, repl, string, count=count)
