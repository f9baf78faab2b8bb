"""The process of a judge: it reads one sample a line and answers with one line; see `judge`.

It imports no JAX, so that it starts in a fraction of a second, and again after a sample that hangs.
"""

import contextlib
import importlib
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from lm import strict_json

RAISED, NOT_FINITE = "raised", "not_finite"

# A reward that takes more memory fails instead of the machine.
_MOST_BYTES = 4 << 30

_MOST_MESSAGE = 300


def main() -> None:
    """Serves until standard input ends.

    Arguments of the process: a JSON object with `registry`, the module that has `REWARDS`,
    `rewards`, pairs of a name and the arguments of its factory, and `seconds`.
    """
    asked = strict_json.loads(sys.argv[1])
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a reward, or a process that it starts, reads or writes there is none of the judge's.
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = min(one for one in (_MOST_BYTES, most) if one != resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError, OSError):  # Not every system can limit it.
        resource.setrlimit(resource.RLIMIT_AS, (least, most))
    try:
        known = importlib.import_module(asked["registry"]).REWARDS
        rewards = [known[name](**arguments) for name, arguments in asked["rewards"]]
    except BaseException as error:
        _write(answers, {"error": _message(error)})
        return
    _write(answers, {"ready": True})
    # The judge kills a process that takes too long. Where the judge itself is gone, this does; the
    # signal has no handler, so that it also ends a function that never comes back to Python.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in lines:
        sample = strict_json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * asked["seconds"] + 1)
        values = [value_of(reward, sample["text"], sample["record"]) for reward in rewards]
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, {"values": values})


def value_of(
    reward: Callable[[str, Any], Any], text: str, record: Mapping[str, Any]
) -> tuple[float | None, str, str]:
    """The value of a reward, "" and ""; or None, why there is none, and a message."""
    try:
        value = reward(text, record)
        if not isinstance(value, Real):
            return None, NOT_FINITE, f"{type(value).__name__}, not a number"
        value = float(value)
    except OverflowError:
        return None, NOT_FINITE, "a number too large for a float"
    except BaseException as error:  # SystemExit, too: it would end the process.
        return None, RAISED, _message(error)
    if not math.isfinite(value):
        return None, NOT_FINITE, str(value)
    return value, "", ""


def _message(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MOST_MESSAGE]
    except Exception:  # A class of errors may raise when it is written.
        return type(error).__name__


def _write(file: Any, answer: dict[str, Any]) -> None:
    file.write(strict_json.dumps(answer).encode() + b"\n")
    file.flush()


if __name__ == "__main__":
    main()
