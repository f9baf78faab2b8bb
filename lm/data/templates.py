"""Chat templates: the Jinja source that comes with a tokenizer, rendered with bounds.

A template is outside input. It runs in Jinja's immutable sandbox, which gives it no attribute of
Python's internals, no file and no other template; the loops it makes are counted, and the text it
makes is measured.
"""

import datetime
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes, sandbox
from jinja2.ext import Extension
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lm import strict_json
from lm.errors import InputError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")

# Rounds of all loops and calls of macros of one rendering, its seconds, the characters of any text
# that it makes beyond 100 times those that it is given, those of its source, and the values in any
# list.
_MOST_ROUNDS = 1_000_000
_MOST_SECONDS = 60.0
_MOST_CHARACTERS = 10_000_000
_MOST_SOURCE = 1_000_000
_MOST_VALUES = 200_000

_Containers = list | tuple | dict | Namespace

# A template that asks for the date gets this one, which Llama 3's write where there is no clock:
# the same chat must be the same tokens on every day.
_DATE = datetime.datetime(2024, 7, 26)


class Message(NamedTuple):
    """One message of a chat: who says it, and what."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template; see `make_template`.

    Attributes:
      source: what it was made from.
      markers: texts that open and close turns even where they are no special tokens.
    """

    def __init__(self, source: str, special: Mapping[str, str], markers: Sequence[str] = ()):
        self.source, self.markers = source, tuple(markers)
        self._special = dict(special)
        self._environment = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        try:
            if len(source) > _MOST_SOURCE:
                raise ValueError(f"longer than {_MOST_SOURCE:,} characters")
            parsed = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except Exception as error:  # Jinja raises its own, RecursionError and more.
            raise InputError(f"chat template: cannot be read: {_line(error)}") from None
        # Jinja would write nothing in its place, which no error would show.
        lacks = sorted(
            name
            for name in meta.find_undeclared_variables(parsed) - special.keys()
            if name.endswith("_token")
        )
        if lacks:
            known = ", ".join(special) or "none"
            raise InputError(f"chat template: uses {', '.join(lacks)}; the tokenizer has {known}")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text of a chat.

        Args:
          messages: in order.
          add_generation_prompt: end with what opens an answer, if the template has that.

        Raises:
          InputError: the template refuses the messages, fails, or does not come to an end.
        """
        given = sum(len(message.content) for message in messages)
        variables = {
            **self._special,
            "messages": [message._asdict() for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return self._environment.write(self._template, variables, given)
        except Exception as error:  # A template may raise anything.
            raise InputError(f"chat template: {_line(error)}") from None


def make_template(source: str | None, special: Mapping[str, str]) -> ChatTemplate:
    """Returns the template of a source.

    Args:
      source: Jinja, as the `transformers` library renders it; None is ChatML.
      special: bos_token, eos_token and so on -> the text of that token.

    Raises:
      InputError: it is no Jinja, or needs a special token that is not in `special`.
    """
    return _make_template(source, tuple(sorted(special.items())))


@functools.lru_cache(maxsize=16)
def _make_template(source: str | None, special: tuple[tuple[str, str], ...]) -> ChatTemplate:
    if source is None:
        return ChatTemplate(CHATML, dict(special), CHATML_MARKERS)
    return ChatTemplate(source, dict(special))


class _Generation(Extension):
    """{% generation %}, with which some templates mark answers: its body is rendered."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds, and with what `transformers` offers to templates.

    Args:
      **options: of `jinja2.Environment`.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._bounds = threading.local()
        self.filters["tojson"] = _to_json
        # Both make text of any width from a few characters.
        del self.filters["center"], self.filters["format"]
        self.filters = {name: self._measured(f) for name, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_refuse, strftime_now=_DATE.strftime)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Offers a filter, its result measured as those of Jinja's own."""
        self.filters[name] = self._measured(function)

    def write(self, template: jinja2.Template, variables: Mapping[str, Any], given: int) -> str:
        """The text that a template of this sandbox makes.

        Args:
          template: of `from_string`.
          variables: by name.
          given: characters of the text in them.

        Raises:
          ValueError, or whatever a template raises: it fails, or goes beyond the bounds.
        """
        limit = _MOST_CHARACTERS + 100 * given
        self.begin(limit)
        pieces = []
        for piece in template.generate(variables):
            pieces.append(piece)
            limit -= len(piece)
            if limit < 0:
                raise ValueError("it writes too much text")
        return "".join(pieces)

    def begin(self, most_characters: int) -> None:
        """Starts the counts of one rendering in this thread."""
        self._bounds.rounds = 0
        self._bounds.deadline = time.monotonic() + _MOST_SECONDS
        self._bounds.characters = most_characters

    def tick(self) -> str:
        """Counts a round of a loop."""
        self._bounds.rounds += 1
        if self._bounds.rounds > _MOST_ROUNDS or time.monotonic() > self._bounds.deadline:
            raise ValueError("it takes too long: too many rounds of its loops")
        return ""

    def measure(self, value: Any) -> Any:
        """Returns the value, if its size is within the bounds."""
        too_long = isinstance(value, str) and len(value) > self._most()
        if too_long or (isinstance(value, _Containers) and not _is_small(value)):
            raise ValueError("it makes too much text")
        return value

    def join(self, *parts: Any) -> str:
        """Returns what `~` makes of its parts."""
        return self.measure("".join(map(str, parts)))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or a method for a template."""
        name = getattr(function, "__name__", "")
        if name in ("format", "format_map"):
            raise ValueError(f"it calls {name}, which has no bound")
        arguments = (*args, *kwargs.values())
        self._check(getattr(function, "__self__", None), name, arguments)
        return self.measure(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes one of `intercepted_binops` for a template."""
        if operator == "%" and isinstance(left, str):
            raise ValueError("it formats text with %, which has no bound")
        if operator == "**" and abs(right) > 64:
            raise ValueError("it makes too large a number")
        if operator in ("*", "**"):
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and abs(one) > 2**64:
                    raise ValueError("it makes too large a number")
                if isinstance(one, str | list | tuple) and len(one) * other > self._most():
                    raise ValueError("it makes too much text")
        return self.measure(super().call_binop(context, operator, left, right))

    def _most(self) -> int:
        return getattr(self._bounds, "characters", _MOST_CHARACTERS)

    def _check(self, text: Any, name: str, args: Sequence[Any]) -> None:
        """Refuses a call of a method of text, or a filter, that makes much of little."""
        if not isinstance(text, str):
            return
        if any(isinstance(arg, int) and arg > self._most() for arg in args):
            raise ValueError("it makes too much text")
        if name in ("replace", "do_replace") and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            if text.count(old) * len(new) > self._most():
                raise ValueError("it makes too much text")

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its arguments checked and its result measured."""

        @functools.wraps(function)  # Which copies what says that it takes the context first.
        def measured(*args: Any, **kwargs: Any) -> Any:
            of_text = [i for i, arg in enumerate(args[:2]) if isinstance(arg, str)]
            if of_text:
                rest = (*args[of_text[0] + 1 :], *kwargs.values())
                self._check(args[of_text[0]], function.__name__, rest)
            return self.measure(function(*args, **kwargs))

        return measured

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))


class _Counted(NodeTransformer):
    """Adds calls of `tick`, `measure` and `join` of the environment to a parsed template."""

    def _looping(self, node: nodes.Node) -> nodes.Node:
        node = self.generic_visit(node)
        tick = nodes.Output([_own("tick", [], node.lineno)], lineno=node.lineno)
        node.body = [tick, *node.body]
        return node

    visit_For = visit_Macro = visit_CallBlock = _looping

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        node = self.generic_visit(node)
        return _own("join", node.nodes, node.lineno)

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        node = self.generic_visit(node)
        node.node = _own("measure", [node.node], node.lineno)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        node = self.generic_visit(node)
        # Every filter measures its result; this one changes nothing.
        plain = nodes.Filter(None, "string", [], [], None, None, lineno=node.lineno)
        node.filter = node.filter or plain
        return node


def _is_small(value: Any) -> bool:
    """Whether a container has few values in it, those of nested containers counted each time."""
    left, waiting = _MOST_VALUES, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            left -= len(value)
            if left < 0:
                return False
            waiting += value
    return True


def _own(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a method of the environment, which no template can name."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=line)
    call.node.lineno = line
    return call


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without the escapes that Jinja's own filter makes for HTML."""
    valid = {"ensure_ascii", "separators", "sort_keys"}
    if options.keys() - valid or (indent or 0) > 16:
        raise ValueError("tojson has other options than it may have")
    return strict_json.dumps(value, indent=indent, **({"ensure_ascii": False} | options))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
