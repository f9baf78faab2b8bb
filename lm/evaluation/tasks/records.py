"""The documents of a task: JSON objects, one a line or in one array.

The `datasets` library, with which lm_eval reads them, takes both, too. A file is read
whole, so its size is checked first.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.data.json_lines import sound
from lm.errors import InputError, shown

_MOST_BYTES = 256 * 2**20


def find(name: str, task_file: Path) -> Path:
    """The file of a name in a task: of the working directory, as lm_eval takes it.

    Where there is none, of the folder of the task's own file.

    Raises:
      InputError: there is none in either.
    """
    path = Path(name).expanduser()
    beside = task_file.parent / path
    found = next((one for one in (path, beside) if one.is_file()), None)
    if found is None:
        raise InputError(
            f"{task_file}: dataset_kwargs.data_files: no file {shown(name, 200)}, neither in the "
            f"working directory nor in {task_file.parent}"
        )
    return found


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """All records of the files. Every record has the fields of all, None where it lacks one.

    Raises:
      InputError: a file is too large or no UTF-8, or a line is no JSON object; the message opens
        with the file and the line's number. Or there is no record.
    """
    found = [record for path in paths for record in _of_file(path)]
    if not found:
        raise InputError(f"{paths[0] if paths else 'data_files'}: has no record")
    names = dict.fromkeys(name for record in found for name in record)
    return [{name: record.get(name) for name in names} for record in found]


def _of_file(path: Path) -> list[dict[str, Any]]:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InputError(f"{path}: {size:,} bytes; valid: at most {_MOST_BYTES:,}")
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not JSON lines in UTF-8") from None
    if content.lstrip().startswith("["):
        records = _parsed(content, str(path))
        return [_object(one, f"{path}: record {i}") for i, one in enumerate(records)]
    lines = enumerate(content.split("\n"), 1)
    return [
        _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
        for number, line in lines
        if line.strip()
    ]


def _parsed(text: str, where: str) -> Any:
    try:
        return sound(json.loads(text))
    except (ValueError, RecursionError) as error:  # Also thousands of digits, or of brackets.
        reason = shown(str(error).partition(";")[0])
        raise InputError(f"{where}: not a line of JSON: {reason}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
