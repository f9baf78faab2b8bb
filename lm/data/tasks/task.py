"""What a made task is."""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Made(NamedTuple):
    """One problem of a task.

    Attributes:
      prompt: what is asked.
      answer: one that is right.
      further: what else a reward wants to know, as JSON values.
    """

    prompt: str
    answer: str
    further: Mapping[str, Any] = {}


class Draw:
    """Random whole numbers that are the same on every machine and in every version of Python.

    Python promises that for `random.random` of a seed alone, so nothing else is used.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def below(self, end: int) -> int:
        """A number from 0 to `end` - 1, each as likely as the others up to 2^-53 * end."""
        return int(self._random.random() * end)

    def between(self, first: int, last: int) -> int:
        """A number from `first` to `last`, both included."""
        return first + self.below(last - first + 1)


Task = Callable[[Draw], Made]


def check_between(name: str, value: int, least: int, most: int) -> None:
    """Raises ValueError, which names the argument, unless `least` <= value <= `most`."""
    if not least <= value <= most:
        raise ValueError(f"{name}={value} must be from {least} to {most}")
