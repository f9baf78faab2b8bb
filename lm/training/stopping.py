"""Signals that ask a run to stop."""

import contextlib
import signal
import time
from collections.abc import Iterator


class StopRequest:
    """Whether a signal has asked this process to stop, and when."""

    def __init__(self):
        self._since: float | None = None

    def note(self) -> None:
        """Records that a signal has come."""
        self._since = self._since or time.monotonic()

    def __bool__(self) -> bool:
        return self._since is not None

    def overdue(self, seconds: float) -> bool:
        """Whether it came at least `seconds` ago."""
        return self._since is not None and time.monotonic() - self._since >= seconds


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Within it the first SIGTERM or SIGINT is only noted; a second one acts as usual."""
    request, previous = StopRequest(), {}

    def note(number, frame):
        request.note()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
