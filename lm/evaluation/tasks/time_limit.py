"""A limit on the seconds of a regular expression that comes from a file."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from lm.errors import InputError

_SECONDS = 10.0


class _TooSlow(Exception):
    """The time is up."""


@contextlib.contextmanager
def limited(what: str, seconds: float = _SECONDS) -> Iterator[None]:
    """Within it Python's regular expressions take at most so many seconds.

    Python looks for signals while it matches, in the main thread; elsewhere there is no limit.

    Args:
      what: key of the expression, for the message.
      seconds: the limit.

    Raises:
      InputError: they took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooSlow:
        raise InputError(f"{what} takes longer than {seconds:g} seconds to match") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
