"""The hyper-parameters of a factory: its arguments, with their defaults and what they mean."""

import inspect
import re
from collections.abc import Callable
from typing import Any

# Arguments that no section of their factory sets: the objective that another one extends, and the
# temperature that answers are drawn with, which is a key of its own.
GIVEN = ("base", "sampling_temperature")

_LINE = re.compile(r"^  (?P<names>\w+(?:, \w+)*): (?P<meaning>.*)$")


def hyperparameters(factory: Callable[..., Any]) -> dict[str, tuple[Any, str]]:
    """Name -> (default, meaning) of every argument, in the order of the signature.

    Meanings are read from the `Args:` section of the docstring, where one line can speak of several
    arguments ("low, high: ..."); a meaning may go on in further, indented lines.

    Raises:
      ValueError: an argument without a default or without a meaning.
    """
    meanings = _meanings(inspect.getdoc(factory) or "")
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name in GIVEN:
            continue
        if parameter.default is inspect.Parameter.empty or name not in meanings:
            raise ValueError(
                f"{factory.__name__}: argument {name!r} needs a default and a line in the Args "
                "section of the docstring"
            )
        found[name] = (parameter.default, meanings[name])
    return found


def _meanings(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in doc.splitlines():
        if not line.startswith(" ") and line:
            inside = line == "Args:"
            continue
        if not inside:
            continue
        if match := _LINE.match(line):
            names = match["names"].split(", ")
            found |= dict.fromkeys(names, match["meaning"].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
