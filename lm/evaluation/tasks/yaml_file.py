"""A YAML file from outside, read with bounds: nothing in it is executed."""

from pathlib import Path
from typing import Any

import yaml

from lm.errors import InputError, shown
from lm.evaluation.tasks.time_limit import limited

# Bytes of a file, and values in it, those of an alias counted at each of its places.
_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
      InputError: no such file, too large, no YAML, a tag such as !function, or no mapping.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; valid: a task in YAML")
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: larger than {_MOST_BYTES:,} bytes, which no task is")
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not text in UTF-8") from None
    try:
        with limited(str(path)):
            found = yaml.safe_load(content)
    except yaml.constructor.ConstructorError as error:
        place = error.problem_mark
        raise InputError(
            f"{path}:{place.line + 1}: {shown(error.problem)}; valid: plain values, as no code of "
            "a task is run"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not YAML: {shown(str(error.problem))}") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML that can be read: {shown(str(error))}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path}: must be a mapping with keys such as task and output_type")
    _check_size(found, path)
    return found


def _check_size(value: Any, path: Path) -> None:
    """Refuses values that aliases make large, or that hold themselves."""
    left, waiting = _MOST_VALUES, [value]
    while waiting:
        value = waiting.pop()
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(inner, list):
            left -= len(inner)
            if left < 0:
                raise InputError(f"{path}: more than {_MOST_VALUES:,} values")
            waiting += inner
