"""JSON as RFC 8259 has it: no NaN and no infinities, which Python would write bare.

A number that is not finite is written as null, and a field of the object says which number it was:
{"loss": null, "not_finite": {"loss": "nan"}}. In objects and lists inside, the field is nested as
they are, with indices as names.
"""

import json
import math
from typing import Any

_FIELD = "not_finite"


def dumps(value: Any, **options: Any) -> str:
    """The value as JSON text. `options` are those of `json.dumps`.

    Raises:
      ValueError: the value is no object, and holds a number that is not finite.
    """
    cleaned, found = _split(value)
    if found:
        if not isinstance(value, dict):
            raise ValueError("only an object can hold numbers that are not finite")
        cleaned[_FIELD] = found
    return json.dumps(cleaned, allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """What `dumps` was given; also reads what has bare NaN or Infinity.

    Raises:
      ValueError: it is no JSON.
    """
    value = json.loads(text)
    if isinstance(value, dict) and isinstance(value.get(_FIELD), dict):
        _restore(value, value.pop(_FIELD))
    return value


def _split(value: Any) -> tuple[Any, Any]:
    """The value with None for what is not finite, and those numbers as text in the same places."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, str(float(value))
    if isinstance(value, dict):
        parts = {name: _split(part) for name, part in value.items()}
        cleaned = {name: part for name, (part, _) in parts.items()}
        return cleaned, {name: found for name, (_, found) in parts.items() if found}
    if isinstance(value, list | tuple):
        parts = [_split(part) for part in value]
        found = {str(i): found for i, (_, found) in enumerate(parts) if found}
        return [part for part, _ in parts], found
    return value, {}


def _restore(value: Any, found: dict[str, Any]) -> None:
    for name, number in found.items():
        place = int(name) if isinstance(value, list) else name
        if isinstance(number, dict):
            _restore(value[place], number)
        else:
            value[place] = float(number)
