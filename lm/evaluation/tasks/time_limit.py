"""A limit on the time of what comes from a file, such as a regular expression."""

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
    """A context that stops this process after `seconds` of processor time.

    Python looks for signals in the main thread, also while it matches a regular expression;
    elsewhere there is no limit. Seconds in which other processes have the processor do not count.

    Args:
      what: key or file, for the message.
      seconds: the limit.

    Raises:
      InputError: they took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TooSlow:
        raise InputError(f"{what} takes longer than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
