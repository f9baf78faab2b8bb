"""JSON as RFC 8259 defines it, which has neither NaN nor infinity.

`dumps` writes null for a float that is not finite, and adds a field "not_finite" to the outermost
object that says what each of them was:

  {"step": 5, "loss": null, "grad_norm": null, "not_finite": {"loss": "nan", "grad_norm": "inf"}}

A value inside nested objects or arrays is named by its keys and indices, joined by "/"; in a key,
"~" is written "~0" and "/" is written "~1", as in JSON Pointer (RFC 6901). `loads` turns these
nulls back into floats.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

FIELD = "not_finite"


def dumps(value: Any, **options: Any) -> str:
    """The JSON text of a value. `options` are those of `json.dumps`.

    An outermost array has no place for the field: its values that are not finite are null alone.

    Raises:
      TypeError: the value holds something that JSON has no form for.
    """
    return json.dumps(encode(value), allow_nan=False, **options)


def encode(value: Any) -> Any:
    """The value with null for floats that are not finite, and the field; unchanged without any."""
    found = dict(_not_finite(value, ()))
    if not found:
        return value
    replaced = _without(value)
    if isinstance(replaced, dict):
        replaced[FIELD] = found
    return replaced


def loads(text: str | bytes) -> Any:
    """The value of a JSON text, with the floats that `dumps` wrote as null.

    Bare NaN and Infinity, which files of older commits hold, are read, too.

    Raises:
      ValueError: the text is not JSON.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get(FIELD), dict):
        return value
    for path, name in value.pop(FIELD).items():
        *parents, last = [_unescaped(part) for part in path.split("/")]
        place = value
        try:
            for key in parents:
                place = place[int(key) if isinstance(place, list) else key]
            place[int(last) if isinstance(place, list) else last] = float(name)
        except (IndexError, KeyError, TypeError, ValueError):
            raise ValueError(f"{FIELD} names {path}={name}, which is not in the text") from None
    return value


def _not_finite(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(path, "nan" | "inf" | "-inf") of every float in a value that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield "/".join(path), str(float(value))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, (*path, _escaped(str(key))))
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _not_finite(part, (*path, str(i)))


def _without(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without(part) for part in value]
    return value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _unescaped(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
