"""The exceptions that mean: the user can mend this."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any


class InputError(ValueError):
    """Bad input: one line that names the key or file and says what would be valid.

    Commands print it without a traceback and exit with code 2.
    """


def shown(value: Any, most: int = 80) -> str:
    """The beginning of a value from a file for a message: one line, no control characters."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return " ".join(text[: 2 * most].split())[:most]


class StorageError(RuntimeError):
    """What a run has to keep cannot be written: a full disk, a quota, a read-only folder.

    One line; launch.train prints it without a traceback and exits with code 74.
    """


@contextlib.contextmanager
def writing(what: Any) -> Iterator[None]:
    """Turns errors of the operating system into a StorageError that names `what`."""
    try:
        yield
    except Exception as error:
        if reason := _refusal(error):
            raise StorageError(f"{what} cannot be written: {reason}") from error
        raise


def _refusal(error: Exception) -> str:
    """What the operating system has said; "" for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    # TensorStore's, as in "...: No space left on device [os_error_code='28']".
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else ""
