"""A progress bar on a terminal; lines of progress elsewhere."""

import sys
from collections.abc import Callable
from typing import Any

import jax


def progress_bar(total: int, done: int) -> Any:
    """A tqdm bar of steps on process 0 where standard error is a terminal; None elsewhere."""
    if not sys.stderr.isatty() or jax.process_index():
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def above(progress: Any, say: Callable[[str], None]) -> Callable[[str], None]:
    """Makes lines appear above the progress bar, where there is one."""
    if progress is None:
        return say

    def shown(line):
        with progress.external_write_mode(file=sys.stderr):
            say(line)

    return shown


def duration(seconds: float) -> str:
    """As 1h02m, or 3m04s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
