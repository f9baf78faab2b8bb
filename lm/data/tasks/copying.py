"""Copying: copy xkcd= is xkcd."""

import string

from lm.data.tasks.task import Draw, Made, Task, check_between


def copying(length: int = 8) -> Task:
    """Random small letters, to be repeated.

    Args:
      length: letters at most, from 1 to 1000; there are as many, or fewer, equally likely.
    """
    check_between("length", length, 1, 1000)

    def make(draw: Draw) -> Made:
        letters = string.ascii_lowercase
        text = "".join(letters[draw.below(26)] for _ in range(draw.between(1, length)))
        return Made(f"copy {text}=", text)

    return make
